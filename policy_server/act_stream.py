"""One ``StreamAct`` call: requests are read and answers written side by side, or in lockstep.

Loop thread only. A task of gRPC's reads and takes requests, one of ours writes what gets ready while
nothing is taken. Where all episodes of a client wait for one answer, the first lets callbacks do both.
What a client neither reads nor waits for is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from client_sdk.traffic import Traffic
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.acting import Acting
from policy_server.calls import Context, parse
from policy_server.faults import as_fault
from policy_server.lockstep import Lockstep
from policy_server.requests import Ask
from policy_server.sessions import Session, SessionRegistry

_MAX_UNREAD = 1000
"""Answers of one stream that its client has not read; beyond that no more requests are."""


class ActStream:
    """One ``StreamAct`` call: reads requests, writes answers in the order they get ready."""

    def __init__(
        self,
        context: Context,
        sessions: SessionRegistry,
        acting: Acting,
        traffic: Traffic,
        *,
        max_open_episodes: int,
    ) -> None:
        """Take a call; nothing is read until ``serve``.

        Args:
            context: Of the call.
            sessions: Which of them it works for, its requests name.
            acting: Answers its requests.
            traffic: Counts messages that gRPC does not hand over itself.
            max_open_episodes: Of one session.
        """
        self._context = context
        self._sessions = sessions
        self._acting = acting
        self._lockstep = Lockstep(context, traffic)
        self._plain_rows = acting.plain_rows()
        # One request for each open episode may wait; whatever is beyond that repeats itself.
        self._max_asks = max_open_episodes + _MAX_UNREAD
        self._outbox: deque[bytes] = deque()  # serialized answers
        self._asks: set[Ask] = set()  # unanswered
        self._news: asyncio.Future[None] | None = None  # what the idle writer waits for
        # What a reader that is too far ahead waits for.
        self._room: asyncio.Future[None] | None = None
        # What a reader waits for while its client goes in lockstep.
        self._turns: asyncio.Future[None] | None = None
        self._writing = False
        self._taking = False  # a request is being taken; its reader writes what it answers
        self._ended = False  # the client sends no more, but may wait for what it asked
        self._session: Session | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._fault: Fault | None = None  # what we end it with
        self._begun = False  # the first answer is out
        self._ends_once_begun = False

    @property
    def named(self) -> bool:
        """Whether a request has named its session."""
        return self._session is not None

    def end(self, fault: Fault) -> None:
        """See ``sessions.Call``; when draining, what is answered already is still sent."""
        if self._fault is None:
            self._fault = fault
            if self._session is not None:  # what was read already must not work for it
                self._sessions.leave(self._session, self)
                self._session = None
            if self._reader is None:
                return
            # gRPC takes no status while the first message, and the metadata with it, is on its way.
            if self._writing and not self._begun:
                self._ends_once_begun = True
            else:
                self._reader.cancel()

    async def serve(self) -> None:
        """Until the client ends the stream and has its answers, or its connection breaks.

        Raises:
            Fault: What it was ended with, or the client sent garbage.
        """
        self._reader = asyncio.current_task()
        writer = asyncio.create_task(self._write_answers())
        try:
            data = await self._context.read()
            while data is not grpc.aio.EOF:  # type: ignore[comparison-overlap]
                ask = self._take(data)
                if ask is not None and self._is_all(ask):
                    await self._go_in_lockstep(ask)
                data = await self._write_and_read()
            self._ended = True
            self._wake_writer()
            # Not awaited itself: our own cancellation must not reach it.
            await asyncio.wait({writer})
            writer.result()
        except asyncio.CancelledError:
            if self._fault is None:  # the client went away
                raise
            if self._fault.reason is Reason.DRAINING:
                self._ended = True
                self._wake_writer()
                await asyncio.wait({writer})
            raise self._fault from None
        finally:
            writer.cancel()
            if self._session is not None:
                self._sessions.leave(self._session, self)
            for ask in list(self._asks):
                self._acting.withdraw(ask)
            await asyncio.gather(writer, return_exceptions=True)

    def _is_all(self, ask: Ask) -> bool:
        """Whether all episodes of the client wait for that answer, and will have it in an instant."""
        return (
            self._session is not None
            and ask.size >= len(self._session.book.running) > 0
            and self._asks <= {ask}
            and not ask.held
            and self._begun
            and not self._writing
            and self._lockstep.possible
        )

    async def _go_in_lockstep(self, ask: Ask) -> None:
        """Answer that, and read and answer what follows, for as long as each is all there is.

        In callbacks, where the loop would else have to wake this task twice for every request.
        """
        self._turns = asyncio.get_running_loop().create_future()
        if ask.finished:
            self._answer_in_turn()
        try:
            await self._turns
        finally:
            self._turns = None

    def _answer_in_turn(self) -> None:
        if self._writing or len(self._outbox) != 1:  # there is something else to write
            self._end_turns()
            return
        self._writing = True
        try:
            self._lockstep.answer(self._outbox.popleft(), self._take_in_turn)
        except Exception as error:  # must not reach whoever brought the answer
            self._end_turns(error)

    def _take_in_turn(self, data: bytes | None) -> None:
        self._writing = False
        if self._turns is None:  # the call has ended meanwhile
            return
        try:
            ask = None if data is None else self._take(data)
        except Exception as error:  # for the reader, as if it had taken the request
            self._end_turns(error)
            return
        if self._writing:  # it is answered already
            return
        if ask is None or not self._is_all(ask):
            self._end_turns()
        elif ask.finished:
            self._answer_in_turn()

    def _end_turns(self, error: Exception | None = None) -> None:
        if self._turns is None or self._turns.done():
            return
        if error is None:
            self._turns.set_result(None)
        else:
            self._turns.set_exception(error)

    async def _write_and_read(self) -> bytes:
        if self._outbox:  # answered at once: no need to wake the writer for it
            await self._flush()
        while len(self._outbox) >= _MAX_UNREAD or len(self._asks) >= self._max_asks:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        return await self._context.read()

    def _take(self, data: bytes) -> Ask | None:
        # A session's end ends its streams, and while there is one its lease does not run.
        session = self._session
        if session is not None and (plain := self._plain_rows.read(data)) is not None:
            number, group = plain
            return self._ask(number, self._acting.begin_plain, session, group, self._answer, number)
        message = parse(pb.StreamActRequest, data)
        return self._ask(message.request, self._begin, message)

    def _begin(self, message: pb.StreamActRequest) -> Ask:
        session, act = self._session, message.act
        if session is None or act.session_id != session.session_id:
            session = self._enter(act)
        ask = self._acting.begin(session, act, self._answer, message.request)
        self._plain_rows.learn(message)
        return ask

    def _ask(self, number: int, begin: Callable[..., Ask], *arguments: Any) -> Ask | None:
        self._taking = True
        try:
            ask = begin(*arguments)
        except Exception as error:  # told in band: the stream goes on
            self._refuse(number, as_fault(error, "handling a request failed"))
            return None
        finally:
            self._taking = False
        if not ask.finished:
            self._asks.add(ask)
        return ask

    def _enter(self, act: pb.ActRequest) -> Session:
        """Work for the session that a request names from now on."""
        if self._fault is not None:  # ends once its first message is out
            raise self._fault
        session = self._sessions.find(act.session_id)
        if session is not self._session:
            self._sessions.admit(session, self)
            if self._session is not None:
                self._sessions.leave(self._session, self)
            self._session = session
            self._plain_rows.forget()
        return session

    def _answer(self, ask: Ask, fault: Fault | None) -> None:
        self._asks.discard(ask)
        if fault is None:
            try:
                data = self._acting.stream_response(ask)
            except Fault as error:  # must not cost the other requests of this batch their answers
                fault = error
        if fault is not None:
            self._refuse(ask.number, fault)
            return
        self._outbox.append(data)
        # Where it is all there is, at once: it may come before its row is recorded.
        if not self._taking or (self._turns is not None and self._is_all(ask)):
            self._wake_writer()

    def _refuse(self, number: int, fault: Fault) -> None:
        response = pb.StreamActResponse(request=number, error=fault.to_detail())
        self._outbox.append(response.SerializeToString())
        if not self._taking:
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._turns is not None:
            if not self._turns.done():
                self._answer_in_turn()
        elif self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _flush(self) -> None:
        if self._writing:  # gRPC takes one write at a time; whoever writes goes on to the end
            return
        self._writing = True
        try:
            while self._outbox:
                await self._context.write(self._outbox.popleft())
                if not self._begun:
                    self._begun = True
                    if self._ends_once_begun and self._reader is not None:
                        self._reader.cancel()
                if self._room is not None and not self._room.done():
                    self._room.set_result(None)
        finally:
            self._writing = False

    async def _write_answers(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._flush()
            if self._ended and not self._asks:
                return
            self._news = loop.create_future()
            await self._news
