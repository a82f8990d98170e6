"""Uploaded chunks in the order of their numbers: taken, acknowledged again, or refused.

Loop thread only. No gRPC and no waiting here: what is taken is recorded at once, in the session's
``EpisodeBook``, as the rows of remote clients are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.chunk_reader import ChunkReader, steps_of
from policy_server.episodes import EpisodeBook, EpisodeStore
from policy_server.experience import Deliveries
from policy_server.faults import as_fault
from policy_server.tracks import (
    ABANDONED,
    DEFAULT_OPTIONS,
    RUNNING,
    AgentTrack,
    EpisodeOptions,
)

_MAX_REMEMBERED = 10_000
"""Refused chunks, and episodes that they broke, of one session; older ones are forgotten first."""


class UploadLog:
    """What one session has uploaded.

    Attributes:
        accepted: The number of the last chunk that was taken.
        deliveries: Which of them have reached the learner.
        unanswered: The last chunk to learn from whose upload was not answered yet.
    """

    __slots__ = ("accepted", "broken", "deliveries", "faults", "unanswered")

    def __init__(self) -> None:
        self.accepted = 0
        self.unanswered = 0
        self.deliveries = Deliveries()
        # By the chunk's number: a repeat is told again.
        self.faults: OrderedDict[int, Fault] = OrderedDict()
        # Which chunk of an episode was refused.
        self.broken: OrderedDict[int, int] = OrderedDict()

    def refuse(self, sequence: int, episode: int, fault: Fault) -> None:
        """A chunk was taken and failed: its episode cannot go on."""
        self.deliveries.take(sequence).settle()
        _remember(self.faults, sequence, fault)
        if fault.reason is not Reason.EPISODE_ENDED:
            _remember(self.broken, episode, sequence)


class UploadRecorder:
    """Takes the chunks of requests.

    Attributes:
        taken: Chunks so far, without the refused ones.
        refused: Chunks so far that failed.
    """

    def __init__(self, reader: ChunkReader, store: EpisodeStore, *, max_rows: int) -> None:
        self._reader = reader
        self._store = store
        self._max_rows = max_rows
        self.taken = 0
        self.refused = 0

    def check(self, request: pb.UploadEpisodesRequest) -> None:
        """Refuse a request as a whole; nothing of it is recorded yet.

        Raises:
            Fault: Its numbers make no sense, or it is too large.
        """
        rows = 0
        for index, chunk in enumerate(request.chunks):
            if chunk.sequence == 0:
                raise Fault(
                    Reason.MALFORMED_TENSOR,
                    "expected a number from 1 up, got 0; count the chunks of a session",
                    f"chunks[{index}].sequence",
                )
            rows += steps_of(chunk) or 1  # an empty one costs something too
        if rows > self._max_rows:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"expected at most max_rows_per_request={self._max_rows} steps in one request, got "
                f"{rows}; send several requests, or raise that setting on the server",
                "chunks",
            )

    @staticmethod
    def news(chunks: Sequence[pb.Chunk], log: UploadLog) -> int:
        """How many steps are new, and not uploaded again."""
        return sum(map(steps_of, _fresh(chunks, log.accepted)))

    def fills(
        self,
        chunks: Sequence[pb.Chunk],
        starts: Mapping[int, EpisodeOptions],
        book: EpisodeBook,
        log: UploadLog,
    ) -> bool:
        """Whether there are new steps to learn from, which need room in the buffer."""
        return any(
            chunk.status != ABANDONED
            and steps_of(chunk)
            and _options(book, starts, chunk.episode).training
            for chunk in _fresh(chunks, log.accepted)
        )

    def take(
        self,
        chunks: Sequence[pb.Chunk],
        starts: Mapping[int, EpisodeOptions],
        metrics: Sequence[pb.EpisodeMetrics],
        book: EpisodeBook,
        log: UploadLog,
    ) -> list[tuple[int, Fault]]:
        """Record what is new in a request.

        Args:
            chunks: Of the request, which was checked.
            starts: Options of episodes that start with it, or later.
            metrics: The application's own numbers.
            book: The session's episodes.
            log: What the session has uploaded before.

        Returns:
            The chunks that were refused, by their place in the request.

        Raises:
            Fault: LIMIT_EXCEEDED; there would be too many episodes. Nothing is recorded.
        """
        fresh = _fresh(chunks, log.accepted)
        self._check_room(fresh, starts, book)
        noted: dict[int, dict[str, float]] = {}
        for each in metrics:
            noted.setdefault(each.episode, {}).update(each.values)
        for number, values in noted.items():
            book.note_metrics(number, values)
        faults: list[tuple[int, Fault]] = []
        for index, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if sequence <= log.accepted:
                if sequence in log.faults:
                    faults.append((index, log.faults[sequence]))
                continue
            if sequence != log.accepted + 1:
                faults.append((index, _gap(log.accepted + 1, sequence, index)))
                continue
            log.accepted = sequence
            try:
                self._take(chunk, f"chunks[{index}]", starts, noted, book, log)
                self.taken += 1
            except Exception as error:  # one chunk must not cost the others
                fault = as_fault(error, "taking a chunk failed")
                log.refuse(sequence, chunk.episode, fault)
                book.break_off(chunk.episode)
                self.refused += 1
                faults.append((index, fault))
        started = {chunk.episode for chunk in fresh} | log.broken.keys()
        book.announce({n: options for n, options in starts.items() if n not in started})
        return faults

    def _check_room(
        self, fresh: Sequence[pb.Chunk], starts: Mapping[int, EpisodeOptions], book: EpisodeBook
    ) -> None:
        """Go through starts and ends in their order: refusing a chunk later would lose it."""
        change = most = 0
        begun: set[int] = set()
        for chunk in fresh:
            number = chunk.episode
            known = number in begun or number in book.running or book.announced(number) is not None
            if not known:
                begun.add(number)
                change += 1
                most = max(most, change)
            if chunk.status not in (0, RUNNING):
                begun.discard(number)
                change -= 1
        later = book.unheard_of(starts) - {chunk.episode for chunk in fresh}
        self._store.check_room(book.open_episodes, max(most, change + len(later)))

    def _take(
        self,
        chunk: pb.Chunk,
        field: str,
        starts: Mapping[int, EpisodeOptions],
        metrics: Mapping[int, Mapping[str, float]],
        book: EpisodeBook,
        log: UploadLog,
    ) -> None:
        number = chunk.episode
        _check_goes_on(number, field, book, log)
        options = _options(book, starts, number)
        steps = self._reader.read(chunk, field, training=options.training)
        track = self._track(chunk, field, options, book)
        if number in metrics:
            book.note_metrics(number, metrics[number])
        if track.training and steps.batch is not None and not steps.logged:
            log.unanswered = chunk.sequence
        book.upload(track, steps, log.deliveries.take(chunk.sequence))

    @staticmethod
    def _track(
        chunk: pb.Chunk, field: str, options: EpisodeOptions, book: EpisodeBook
    ) -> AgentTrack:
        number, first_step = chunk.episode, chunk.first_step
        episode = book.running.get(number)
        track = None if episode is None else episode.tracks.get(chunk.agent)
        if track is not None:
            if first_step != track.step:
                raise Fault(
                    Reason.STEP_OUT_OF_ORDER,
                    f"episode {number} is at step {track.step}; expected its chunk from there, got "
                    f"one from step {first_step}",
                    f"{field}.first_step",
                )
            return track
        if first_step and not options.resumed:
            raise Fault(
                Reason.UNKNOWN_EPISODE,
                f"episode {number} is not running in this session but the chunk starts at its step "
                f"{first_step}: it was never started, has expired, or the server was restarted "
                "since. Start a new episode, with resumed set to go on in the middle of one",
                f"{field}.first_step",
            )
        if episode is None:
            episode = book.begin(number, options)
        track = episode.tracks[chunk.agent] = AgentTrack(episode, chunk.agent)
        track.step = track.first_step = first_step
        return track


def _fresh(chunks: Sequence[pb.Chunk], accepted: int) -> list[pb.Chunk]:
    """Those that will be taken: the next ones without a gap."""
    fresh = []
    for chunk in chunks:
        if chunk.sequence == accepted + 1:
            fresh.append(chunk)
            accepted += 1
    return fresh


def _options(
    book: EpisodeBook, starts: Mapping[int, EpisodeOptions], number: int
) -> EpisodeOptions:
    episode = book.running.get(number)
    if episode is not None:
        return episode.options
    return book.announced(number) or starts.get(number) or DEFAULT_OPTIONS


def _check_goes_on(number: int, field: str, book: EpisodeBook, log: UploadLog) -> None:
    if number in log.broken:
        raise Fault(
            Reason.EPISODE_ENDED,
            f"episode {number} has ended here: its chunk {log.broken[number]} was refused, and "
            "what follows a gap cannot be joined to it. Go on in another episode, with resumed set",
            f"{field}.episode",
        )
    if book.has_ended(number, ""):
        raise Fault(
            Reason.EPISODE_ENDED,
            f"episode {number} has ended; start another one under a new number",
            f"{field}.episode",
        )


def _gap(expected: int, got: int, index: int) -> Fault:
    return Fault(
        Reason.STEP_OUT_OF_ORDER,
        f"expected chunk {expected} next, got {got}: it was not taken; send the missing ones first",
        f"chunks[{index}].sequence",
    )


def _remember(memory: OrderedDict[int, Any], key: int, value: Any) -> None:
    memory[key] = value
    if len(memory) > _MAX_REMEMBERED:
        memory.popitem(last=False)
