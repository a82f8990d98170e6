"""What is running: the episodes of each session, and the way from their rows into the buffer.

Loop thread only. No I/O and no inference here: recording a row either answers it from memory (a
repeat), refuses it, or leaves it *awaiting* an action that the batcher brings.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from client_sdk.wire import MAX_METRICS
from client_sdk.wire.faults import Fault, Reason
from policy_server.buffer import ExperienceBuffer
from policy_server.experience import Chunk, EpisodeEnd, Receipt
from policy_server.tracks import (
    ABANDONED,
    DEFAULT_OPTIONS,
    RUNNING,
    TERMINATED,
    TRUNCATED,
    AgentTrack,
    Episode,
    EpisodeOptions,
    UploadedSteps,
)

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns

_MAX_REMEMBERED_ENDS = 100_000
"""Ended episodes of one session whose end can still be repeated; older ones are forgotten first."""


class EpisodeBook:
    """The episodes of one session: announced, running, and for a lease, ended.

    Attributes:
        running: By the client's own number.
        count_steps: The store's.
    """

    def __init__(self, store: EpisodeStore) -> None:
        self._store = store
        self.count_steps = store.count_steps
        self.running: dict[int, Episode] = {}
        self._announced: dict[int, EpisodeOptions] = {}
        # How each episode ended, for repeats of its last row: (step, status, when).
        self._ended: OrderedDict[tuple[int, str], tuple[int, int, float]] = OrderedDict()

    @property
    def open_episodes(self) -> int:
        """Announced and running."""
        return len(self.running) + len(self._announced)

    def next_step(self, number: int, step: int) -> AgentTrack | None:
        """The only agent of a running episode, if it is to go on with that step; else None."""
        episode = self.running.get(number)
        track = None if episode is None else episode.tracks.get("")
        if track is None or step != track.step + 1 or track.awaiting is not None:
            return None
        return track

    def announce(self, episodes: Mapping[int, EpisodeOptions]) -> None:
        """Options of episodes to come, by number; a repeat changes nothing.

        Raises:
            Fault: LIMIT_EXCEEDED naming the setting; none of them is announced.
        """
        new = self.unheard_of(episodes)
        if new:
            self._store.check_room(self.open_episodes, len(new))
            self._announced.update((number, episodes[number]) for number in new)
            self._store.announced += len(new)

    def unheard_of(self, numbers: Iterable[int]) -> set[int]:
        """Which of these episodes are neither announced nor running, and have not ended here."""
        return {
            number
            for number in numbers
            if number not in self.running
            and number not in self._announced
            and (number, "") not in self._ended
        }

    def start(self, number: int, agent: str, step: int, field: str) -> AgentTrack:
        """The track of an agent's first row.

        Raises:
            Fault: The episode is not known here, has ended, or there are too many.
        """
        if (number, agent) in self._ended:
            raise Fault(
                Reason.EPISODE_ENDED,
                f"episode {number} has ended; start another one under a new number",
                field,
            )
        if step != 0:
            raise Fault(
                Reason.UNKNOWN_EPISODE,
                f"episode {number} is not running in this session but the row is its step {step}: "
                "it was never started, has expired, or the server was restarted since. "
                "Start a new episode",
                field,
            )
        episode = self.running.get(number) or self.begin(number)
        track = episode.tracks[agent] = AgentTrack(episode, agent)
        return track

    def begin(self, number: int, options: EpisodeOptions | None = None) -> Episode:
        """A new running episode, as it was announced if no options are given.

        Raises:
            Fault: LIMIT_EXCEEDED; there are too many.
        """
        announced = self._announced.pop(number, None)
        if announced is None:
            self._store.check_room(self.open_episodes, 1)
        else:
            self._store.announced -= 1
        options = options or announced or DEFAULT_OPTIONS
        episode = self.running[number] = Episode(number, options, self._store.clock())
        self._store.count_open(1)
        return episode

    def announced(self, number: int) -> EpisodeOptions | None:
        """Options of an episode to come; None if nothing was said of it."""
        return self._announced.get(number)

    def note_metrics(self, number: int, values: Mapping[str, float]) -> None:
        """The application's own numbers of a running episode.

        Unknown episodes are ignored, and so are names beyond ``MAX_METRICS``.
        """
        episode = self.running.get(number)
        if episode is not None:
            for name, value in values.items():
                if name in episode.metrics or len(episode.metrics) < MAX_METRICS:
                    episode.metrics[name] = value

    def end_again(self, number: int, agent: str, step: int, status: int) -> bool:
        """Whether this very end was recorded before; it is remembered anew."""
        key = (number, agent)
        ended = self._ended.get(key)
        if ended is None or ended[:2] != (step, status):
            return False
        self._ended[key] = (step, status, self._store.clock())
        self._ended.move_to_end(key)
        return True

    def end(
        self, track: AgentTrack, step: int, status: int, reward: float, last: Columns | None
    ) -> None:
        """Record an agent's last row."""
        if status == ABANDONED:
            status_learnt = ABANDONED
        elif track.awaiting is not None:
            # Ended before it was answered: no action was taken there, so no step either.
            status_learnt, last = TRUNCATED, track.last_observation()
        else:
            status_learnt = status
            if step > 0:
                track.observe(step, reward)
                self.count_steps(trained=track.training, evaluated=not track.training)
            if last is None and track.last is not None:
                last = track.last_observation()
        self._remember_end(track, step, status)
        self._finish(track.episode, last or {}, status_learnt, reported=status != ABANDONED)

    def upload(self, track: AgentTrack, steps: UploadedSteps, receipt: Receipt) -> None:
        """Record the next steps of a client that acts alone, and perhaps their episode's end."""
        track.append(steps, receipt)
        count = len(steps.rewards)
        self.count_steps(
            trained=count if track.training else 0, evaluated=0 if track.training else count
        )
        if steps.status == RUNNING:
            self._store.cut(track)
        else:
            self._remember_end(track, track.step, steps.status)
            last = track.last_observation() if track.last is not None else {}
            reported = steps.status != ABANDONED
            self._finish(track.episode, last, steps.status, reported=reported)

    def break_off(self, number: int) -> None:
        """Nothing more can be learnt of an episode: it is truncated where it is, if it runs."""
        if self._announced.pop(number, None) is not None:
            self._store.announced -= 1
        episode = self.running.get(number)
        if episode is not None:
            track = next(iter(episode.tracks.values()))
            last = track.last_observation() if track.last is not None else {}
            self._finish(episode, last, TRUNCATED, reported=False)

    def has_ended(self, number: int, agent: str) -> bool:
        """Whether it ended here, within a lease."""
        return (number, agent) in self._ended

    def _remember_end(self, track: AgentTrack, step: int, status: int) -> None:
        key = (track.episode.number, track.agent)
        self._ended[key] = (step, status, self._store.clock())
        if len(self._ended) > _MAX_REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def _finish(self, episode: Episode, last: Columns, status: int, *, reported: bool) -> None:
        del self.running[episode.number]
        self._store.count_open(-1)
        end = episode.end(self._store.clock(), reported=reported)
        for track in episode.tracks.values():
            self._store.hand_in(track, last, status, end)

    def truncate_all(self) -> int:
        """The client is gone: each episode ends at its last complete step. Returns how many."""
        count = len(self.running)
        for episode in list(self.running.values()):
            self.break_off(episode.number)
        self._store.announced -= len(self._announced)
        self._announced.clear()
        return count

    def forget_ends(self, before_s: float) -> None:
        """Drop the memory of ends older than that."""
        while self._ended:
            key = next(iter(self._ended))
            if self._ended[key][2] >= before_s:
                return
            del self._ended[key]

    def training_tracks(self) -> Iterator[AgentTrack]:
        """Of all running agents that are learnt from."""
        for episode in self.running.values():
            if episode.options.training:
                yield from episode.tracks.values()


class EpisodeStore:
    """All sessions' books, and the way from their rows into the buffer.

    Attributes:
        open_episodes: Running, of all sessions.
        announced: To come, of all sessions.
    """

    def __init__(
        self,
        buffer: ExperienceBuffer,
        *,
        max_open_per_session: int,
        max_open: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._buffer = buffer
        self._max_open_per_session = max_open_per_session
        self._max_open = max_open
        self._books: set[EpisodeBook] = set()
        self.open_episodes = 0
        self.announced = 0

    def book(self) -> EpisodeBook:
        """A new session's."""
        book = EpisodeBook(self)
        self._books.add(book)
        return book

    def drop(self, book: EpisodeBook) -> int:
        """The session is over; its unfinished episodes are truncated. Returns how many."""
        lost = book.truncate_all()
        self._books.discard(book)
        return lost

    def check_room(self, open_in_session: int, more: int) -> None:
        """Refuse what would exceed the caps on open episodes."""
        for name, limit, current in (
            ("max_open_episodes_per_session", self._max_open_per_session, open_in_session),
            ("max_open_episodes", self._max_open, self.open_episodes + self.announced),
        ):
            if current + more > limit:
                raise Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"{current} episodes are open and {more} more would exceed {name}={limit}; "
                    "end some first, or raise that setting on the server",
                    retry_after_s=1.0,
                )

    def count_open(self, change: int) -> None:
        """An episode started (+1) or ended (-1)."""
        self.open_episodes += change

    def count_steps(self, *, trained: int, evaluated: int) -> None:
        """Steps were completed: to be learnt from, or never."""
        buffer = self._buffer
        buffer.ledger.received += trained + evaluated
        buffer.running_steps += trained
        if evaluated:
            buffer.ledger.discard("evaluation", evaluated)

    def abandon(self, track: AgentTrack) -> None:
        """Learn nothing more from an agent's episode, and refuse its further rows."""
        episode = track.episode
        for book in self._books:
            if book.running.get(episode.number) is episode:
                book.end(track, track.step, ABANDONED, 0.0, None)
                return

    def cut(self, track: AgentTrack) -> None:
        """Its next action comes from another policy, and a chunk holds one: hand in what there is."""
        if not self._buffer.complete_episodes:
            self._put_running_chunk(track)

    def cut_all(self) -> None:
        """Hand in all complete steps of running episodes, to meet a demand or to make room."""
        chunks = []
        for book in self._books:
            for track in book.training_tracks():
                chunk = track.take_chunk(track.last_observation())
                if chunk is not None:
                    chunks.append(chunk)
        self._buffer.running_steps = 0
        self._buffer.deliver_cut(chunks)

    def _put_running_chunk(self, track: AgentTrack) -> None:
        chunk = track.take_chunk(track.last_observation())
        if chunk is not None:
            self._buffer.running_steps -= chunk.steps
            self._buffer.put([chunk])

    def hand_in(self, track: AgentTrack, last: Columns, status: int, end: EpisodeEnd) -> None:
        """An agent's last chunk, with what to report of its episode."""
        options = track.episode.options
        steps = len(track.rewards)
        self._buffer.running_steps -= steps
        if status == ABANDONED:
            self._buffer.ledger.discard("abandoned", steps)
            track.rows, track.rewards = [], []  # its last row may still be answered
            if track.receipt is not None:
                track.receipt.settle()
            self._buffer.withdraw(track.identity, "abandoned")
            return
        if track.last is None:
            return  # ended before its first action: nothing happened
        chunk = track.take_chunk(last) or Chunk(
            identity=track.identity,
            agent=track.agent,
            policy=track.last[0].policy,
            rows=[],
            rewards=[],
            last_observation=last if options.training else {},
            first_step=track.first_step,
        )
        chunk.terminated = status == TERMINATED
        chunk.truncated = status == TRUNCATED
        chunk.training = options.training
        chunk.end = end
        self._buffer.put([chunk])

    def settle(self) -> None:
        """After each batch of rows: cut running episodes if the buffer asks for it."""
        if self._buffer.wants_cut():
            self.cut_all()
        elif self._buffer.complete_episodes and self._buffer.flushed_whole():
            self._buffer.deliver_cut([])
