"""Requests for actions, whichever call brings them: decode, record, ask, encode.

Loop thread only. ``Act`` and ``StreamAct`` share what is here; they differ in how they wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.announcements import check_metrics, starts_of
from policy_server.answers import AnswerEncoder
from policy_server.batcher import Batcher
from policy_server.episodes import EpisodeBook, EpisodeStore
from policy_server.faults import incidents
from policy_server.plain_rows import PlainRowReader
from policy_server.requests import Ask, Group
from policy_server.rows import RowRecorder
from policy_server.sessions import Session

Done = Callable[[Ask, Fault | None], None]
"""Told what to encode, or why there is nothing."""


class Acting:
    """From a request to its answer.

    Attributes:
        requests: Taken so far, of all calls.
    """

    def __init__(
        self,
        store: EpisodeStore,
        recorder: RowRecorder,
        batcher: Batcher,
        encoder: AnswerEncoder,
        *,
        max_open_episodes: int,
    ) -> None:
        """Put the parts together.

        Args:
            store: Of the episodes.
            recorder: Of rows.
            batcher: Brings actions.
            encoder: Of answers.
            max_open_episodes: Of one session.
        """
        self._store = store
        self._recorder = recorder
        self._batcher = batcher
        self._encoder = encoder
        self._max_open_episodes = max_open_episodes
        self.requests = 0

    def begin(self, session: Session, request: pb.ActRequest, done: Done, number: int = 0) -> Ask:
        """Record a request's rows; ``done`` is called once they are answered, maybe at once.

        Raises:
            Fault: The request as a whole was refused; nothing is recorded.
        """
        if session.local and (request.groups or request.starts or request.metrics):
            raise Fault(
                Reason.WRONG_MODE,
                "expected no rows in a session of INFERENCE_MODE_LOCAL, only a heartbeat without; "
                "upload what was experienced with UploadEpisodes",
                "session_id",
            )
        book = session.book
        groups = self._recorder.decode(request)
        metrics = request.metrics
        if metrics:
            check_metrics(metrics)
        starts = starts_of(request.starts, self._max_open_episodes) if request.starts else None
        if groups:
            session.steps.take(sum(len(group.episodes) for group in groups))
        if starts:
            book.announce(starts)
        ask = Ask(groups, done, number)
        self._batcher.note()
        # Before the rows, for an episode may end with them; and after, for it may start with them.
        for noted in metrics:
            book.note_metrics(noted.episode, noted.values)
        for group in groups:
            self._recorder.record(group, book, ask)
        for noted in metrics:
            book.note_metrics(noted.episode, noted.values)
        self._submit(ask)
        return ask

    def begin_plain(self, session: Session, row: Group, done: Done, number: int) -> Ask:
        """As ``begin``, for what ``plain_rows`` has read."""
        self._recorder.check(row)
        session.steps.take(1)
        ask = Ask([row], done, number)
        self._batcher.note()
        if not self._answer_first(session.book, row, ask):
            self._recorder.record(row, session.book, ask)
            self._submit(ask)
        return ask

    def _answer_first(self, book: EpisodeBook, row: Group, ask: Ask) -> bool:
        """Answer the next step of an episode that runs alone; record it while the answer travels.

        Returns:
            False: it is another kind of row, must wait, or is to be refused.
        """
        (number,), (step,), (reward,) = row.episodes, row.steps, row.rewards
        track = book.next_step(number, step)
        if track is None or row.faults:
            return False
        track.reward = reward  # the engine may want to know
        if not self._batcher.answer_first(ask, row, track):
            return False
        self.requests += 1
        track.observe(step, reward)
        book.count_steps(trained=int(track.training), evaluated=int(not track.training))
        track.awaiting = (row.asked, 0)
        track.queued = True
        self._store.settle()
        self._batcher.recorded(row)
        return True

    def _submit(self, ask: Ask) -> None:
        self.requests += 1
        self._store.settle()
        if ask.asked:
            self._batcher.submit(ask)
        elif not ask.missing:
            ask.finish(None)

    def plain_rows(self) -> PlainRowReader:
        """For one stream."""
        return PlainRowReader(self._recorder.observations)

    def response(self, ask: Ask) -> pb.ActResponse:
        """The answer to a request that came alone.

        Raises:
            Fault: INTERNAL; the policy's actions are not of the action space.
        """
        response = pb.ActResponse()
        try:
            self._encoder.fill(ask.groups, response)
        except Exception as error:  # our bug, even where the codec finds it
            raise incidents.record("encoding an answer failed", error) from error
        return response

    def stream_response(self, ask: Ask) -> bytes:
        """The answer to a request of a stream, serialized.

        Raises:
            Fault: INTERNAL; the policy's actions are not of the action space.
        """
        try:
            return self._encoder.stream_response(ask.number, ask.groups)
        except Exception as error:  # our bug, even where the codec finds it
            raise incidents.record("encoding an answer failed", error) from error

    def withdraw(self, ask: Ask) -> None:
        """Nobody waits for this ask any longer."""
        self._batcher.withdraw(ask)

    def cancel(self, fault: Fault) -> None:
        """Answer all that waits with an error."""
        self._batcher.cancel(fault)


class ActCall:
    """One ``Act`` call that waits for its answer; see ``sessions.Call``.

    Attributes:
        answered: Done once it can be encoded, or will never be.
    """

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answer(self, _ask: Ask, fault: Fault | None) -> None:
        """It can be encoded, or not at all; ignored once the call has ended otherwise."""
        if fault is not None:
            self.end(fault)
        elif not self.answered.done():
            self.answered.set_result(None)

    def end(self, fault: Fault) -> None:
        """See ``sessions.Call``."""
        if not self.answered.done():
            self.answered.set_exception(fault)
