"""The gRPC methods of ``PolicyService``: decode, call, encode. No RL in here.

Loop thread only. Messages are parsed here rather than by gRPC, so that garbage gets an answer
that says so.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import gymnasium as gym
from google.protobuf.message import DecodeError, Message

from client_sdk.wire import MAX_METRIC_NAME, MAX_METRICS, PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import diff, space_to_proto
from policy_server.answers import AnswerEncoder
from policy_server.batcher import Batcher
from policy_server.episodes import EpisodeOptions, EpisodeStore
from policy_server.experience import POLICY_ID
from policy_server.faults import abort, as_fault, incidents
from policy_server.local import LocalInference
from policy_server.requests import Ask
from policy_server.rows import RowRecorder
from policy_server.sessions import Call, Session, SessionRegistry
from policy_server.waiting import Waiting

SERVICE_NAME = "policyserver.v1.PolicyService"

_MAX_LABEL = 256
"""Characters of an episode's label that are kept."""

_MAX_UNREAD = 1000
"""Answers of one stream that its client has not read; beyond that no more requests are."""

_MessageT = TypeVar("_MessageT", bound=Message)
_Context = grpc.aio.ServicerContext[bytes, bytes]
_Done = Callable[[Ask, "Fault | None"], None]
"""Told what to encode, or why there is nothing."""


class PolicyService:
    """Answers clients; one per server.

    Attributes:
        requests: Act requests taken so far, unary or over a stream.
    """

    def __init__(
        self,
        *,
        sessions: SessionRegistry,
        store: EpisodeStore,
        batcher: Batcher,
        recorder: RowRecorder,
        encoder: AnswerEncoder,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        policy_version: Callable[[], int],
        lease_s: float,
        limits: pb.Limits,
        max_calls: int,
        client_config: Mapping[str, Any],
        local: LocalInference,
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._batcher = batcher
        self._recorder = recorder
        self._encoder = encoder
        self._spaces = {"observation_space": observation_space, "action_space": action_space}
        self._policy_version = policy_version
        self._max_calls = max_calls
        self._local = local
        self._draining = False
        self._streams: set[_ActStream] = set()
        self.requests = 0
        self._greeting = pb.OpenSessionResponse(protocol_version=PROTOCOL_VERSION, limits=limits)
        agent = self._greeting.agents[""]
        agent.observation_space.CopyFrom(space_to_proto(observation_space))
        agent.action_space.CopyFrom(space_to_proto(action_space))
        agent.policy_id = POLICY_ID
        self._greeting.lease.FromMicroseconds(int(lease_s * 1e6))
        self._greeting.client_config.update(client_config)

    def handler(self) -> grpc.GenericRpcHandler:
        """What to register with a ``grpc.aio`` server."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "OpenSession": _unary(self._open_session),
                "CloseSession": _unary(self._close_session),
                "Act": _unary(self._act),
                "StreamAct": grpc.stream_stream_rpc_method_handler(self._stream_act),
                "GetPolicy": grpc.unary_stream_rpc_method_handler(self._get_policy),
                "UploadEpisodes": _unary(self._upload_episodes),
            },
        )

    def drain(self) -> None:
        """From now on every call is refused, and those that wait are answered so."""
        self._draining = True
        self._batcher.cancel(_draining())
        self._local.cancel(_draining())
        for stream in list(self._streams):
            stream.end(_draining())

    # Sessions.

    async def _open_session(self, data: bytes) -> Message:
        request = _parse(pb.OpenSessionRequest, data)
        if self._draining:
            raise _draining()
        _check_protocol(request.protocol_version)
        local = request.inference_mode == pb.INFERENCE_MODE_LOCAL
        if local:
            self._local.check_possible("inference_mode")
        elif request.inference_mode != pb.INFERENCE_MODE_REMOTE:
            raise Fault(
                Reason.WRONG_MODE,
                f"expected INFERENCE_MODE_REMOTE ({pb.INFERENCE_MODE_REMOTE}) or "
                f"INFERENCE_MODE_LOCAL ({pb.INFERENCE_MODE_LOCAL}), got {request.inference_mode}",
                "inference_mode",
            )
        for agent, spec in request.agents.items():
            self._check_belief(agent, spec)
        session, _ = self._sessions.open(request.client_name, request.session_id, local=local)
        response = pb.OpenSessionResponse()
        response.CopyFrom(self._greeting)
        response.session_id = session.session_id
        response.policy_version = self._policy_version()
        if local:
            self._local.greet(response, len(self._sessions))
            if request.session_id != session.session_id:
                response.delivered_sequence = self._sessions.uploaded(request.session_id)
        return response

    def _check_belief(self, agent: str, spec: pb.AgentSpec) -> None:
        if agent != "":
            raise Fault(
                Reason.UNKNOWN_AGENT,
                f'unknown agent {agent!r}; this server knows one agent, ""',
                f"agents[{agent!r}]",
            )
        for name, space in self._spaces.items():
            if not spec.HasField(name):
                continue
            field = f"agents[{agent!r}].{name}"
            try:
                difference = diff(getattr(spec, name), space)
            except Fault as fault:
                raise Fault(fault.reason, fault.message, field) from fault
            if difference is not None:
                raise Fault(
                    Reason.SPACE_MISMATCH,
                    f"client and server disagree: {difference}. "
                    "Start the server with the simulator's spaces, or update the simulator",
                    field,
                )

    async def _close_session(self, data: bytes) -> Message:
        request = _parse(pb.CloseSessionRequest, data)
        self._sessions.close(request.session_id)
        return pb.CloseSessionResponse()

    # Acting.

    async def _act(self, data: bytes) -> Message:
        request = _parse(pb.ActRequest, data)
        session = self.session_of(request)
        call = _ActCall()
        self.admit(session, call)
        ask = None
        try:
            ask = self.begin(session, request, call.answer)
            await call.answered
            response = pb.ActResponse()
            try:
                self._encoder.fill(ask.groups, response)
            except Exception as error:  # our bug, even where the codec finds it
                raise incidents.record("encoding an answer failed", error) from error
            return response
        finally:
            self.leave(session, call)
            if ask is not None:
                self.withdraw(ask)

    async def _stream_act(self, _requests: Any, context: _Context) -> None:
        # One request for each open episode may wait; whatever is beyond that repeats itself.
        max_asks = self._greeting.limits.max_open_episodes + _MAX_UNREAD
        stream = _ActStream(self, context, max_asks)
        self._streams.add(stream)
        try:
            await stream.serve()
        except Fault as fault:
            await abort(context, fault)
        finally:
            self._streams.discard(stream)

    # Acting alone.

    async def _get_policy(self, data: bytes, context: _Context) -> None:
        try:
            request = _parse(pb.GetPolicyRequest, data)
            self._local.check_possible()
            session = self.session_of(request)
            call = Waiting()
            self.admit(session, call)
            try:
                for message in await self._local.downloads.answer(request, call):
                    await context.write(message)
            finally:
                self.leave(session, call)
        except Exception as error:  # as in _unary
            await abort(context, as_fault(error, "GetPolicy failed"))

    async def _upload_episodes(self, data: bytes) -> Message:
        request = _parse(pb.UploadEpisodesRequest, data)
        session = self.session_of(request)
        self._local.check_possible()
        starts = self._starts_of(request.starts)
        _check_metrics(request.metrics)
        call = Waiting()
        self.admit(session, call)
        try:
            return await self._local.upload(session, request, starts, call)
        finally:
            self.leave(session, call)

    def session_of(
        self, request: pb.ActRequest | pb.GetPolicyRequest | pb.UploadEpisodesRequest
    ) -> Session:
        """The session that a request names, its lease renewed."""
        if self._draining:
            raise _draining()
        return self._sessions.find(request.session_id)

    def admit(self, session: Session, call: Call) -> None:
        """Count a call among its session's.

        Raises:
            Fault: LIMIT_EXCEEDED; the session has too many already.
        """
        if len(session.calls) >= self._max_calls:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"{len(session.calls)} calls of this session are under way, as many as "
                f"max_calls_per_session={self._max_calls} allows; wait for their answers, use one "
                "StreamAct for all, or raise that setting on the server",
                retry_after_s=0.1,
            )
        session.calls.add(call)

    def leave(self, session: Session, call: Call) -> None:
        """The opposite of ``admit``; from here on the lease runs."""
        session.calls.discard(call)
        session.last_seen_s = self._sessions.clock()

    def begin(self, session: Session, request: pb.ActRequest, done: _Done, number: int = 0) -> Ask:
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
        recorder = self._recorder
        groups = recorder.decode(request)
        metrics = request.metrics
        if metrics:
            _check_metrics(metrics)
        if request.starts:
            book.announce(self._starts_of(request.starts))
        ask = Ask(groups, done, number)
        # Before the rows, for an episode may end with them; and after, for it may start with them.
        for noted in metrics:
            book.note_metrics(noted.episode, noted.values)
        for group in groups:
            recorder.record(group, book, ask)
        for noted in metrics:
            book.note_metrics(noted.episode, noted.values)
        self.requests += 1
        self._store.settle()
        if ask.asked:
            self._batcher.submit(ask)
        elif not ask.missing:
            ask.finish(None)
        return ask

    def _starts_of(self, starts: Sequence[pb.EpisodeStart]) -> dict[int, EpisodeOptions]:
        """What a request says of episodes to come, by their number."""
        limit = self._greeting.limits.max_open_episodes
        if len(starts) > limit:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"expected at most max_open_episodes_per_session={limit} starts, got "
                f"{len(starts)}; end some episodes first, or raise that setting on the server",
                "starts",
            )
        return {
            start.episode: EpisodeOptions(
                label=start.label[:_MAX_LABEL],
                evaluation=start.evaluation,
                greedy=start.greedy,
                resumed=start.resumed,
            )
            for start in starts
        }

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


class _ActCall:
    """One ``Act`` call that waits for its answer."""

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


class _ActStream:
    """One ``StreamAct`` call: reads requests, writes answers in the order they get ready."""

    def __init__(self, service: PolicyService, context: _Context, max_asks: int) -> None:
        self._service = service
        self._max_asks = max_asks
        self._context = context
        self._outbox: deque[bytes] = deque()  # serialized answers
        self._asks: set[Ask] = set()  # unanswered
        self._news: asyncio.Future[None] | None = None  # what the idle writer waits for
        self._room: asyncio.Future[None] | None = (
            None  # what a reader that is too far ahead waits for
        )
        self._writing = False
        self._taking = False  # a request is being taken; its reader writes what it answers
        self._ended = False  # the client sends no more, but may wait for what it asked
        self._session: Session | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._fault: Fault | None = None  # what we end it with

    def end(self, fault: Fault) -> None:
        """See ``sessions.Call``; when draining, what is answered already is still sent."""
        if self._fault is None:
            self._fault = fault
            if self._session is not None:  # what was read already must not work for it
                self._service.leave(self._session, self)
                self._session = None
            if self._reader is not None:
                self._reader.cancel()

    async def serve(self) -> None:
        """Until the client ends the stream and has its answers, or its connection breaks.

        Raises:
            Fault: What it was ended with, or the client sent garbage.
        """
        self._reader = asyncio.current_task()
        writer = asyncio.create_task(self._write_answers())
        try:
            while (data := await self._context.read()) is not grpc.aio.EOF:  # type: ignore[comparison-overlap]
                self._take(data)
                if self._outbox:  # answered at once: no need to wake the writer for it
                    await self._flush()
                while len(self._outbox) >= _MAX_UNREAD or len(self._asks) >= self._max_asks:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
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
            await asyncio.gather(writer, return_exceptions=True)
            for ask in list(self._asks):
                self._service.withdraw(ask)
            if self._session is not None:
                self._service.leave(self._session, self)

    def _take(self, data: bytes) -> None:
        message = _parse(pb.StreamActRequest, data)
        act, number = message.act, message.request
        self._taking = True
        try:
            session = self._session
            # A session's end ends its streams, and while there is one its lease does not run.
            if session is None or act.session_id != session.session_id:
                session = self._enter(act)
            ask = self._service.begin(session, act, self._answer, number)
        except Exception as error:  # told in band: the stream goes on
            self._refuse(number, as_fault(error, "handling a request failed"))
            return
        finally:
            self._taking = False
        if not ask.finished:
            self._asks.add(ask)

    def _enter(self, act: pb.ActRequest) -> Session:
        """Work for the session that a request names from now on."""
        session = self._service.session_of(act)
        if session is not self._session:
            self._service.admit(session, self)
            if self._session is not None:
                self._service.leave(self._session, self)
            self._session = session
        return session

    def _answer(self, ask: Ask, fault: Fault | None) -> None:
        self._asks.discard(ask)
        if fault is None:
            try:
                data = self._service.stream_response(ask)
            except Fault as error:  # must not cost the other requests of this batch their answers
                fault = error
        if fault is not None:
            self._refuse(ask.number, fault)
            return
        self._outbox.append(data)
        if not self._taking:
            self._wake_writer()

    def _refuse(self, number: int, fault: Fault) -> None:
        response = pb.StreamActResponse(request=number, error=fault.to_detail())
        self._outbox.append(response.SerializeToString())
        if not self._taking:
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _flush(self) -> None:
        if self._writing:  # gRPC takes one write at a time; whoever writes goes on to the end
            return
        self._writing = True
        try:
            while self._outbox:
                await self._context.write(self._outbox.popleft())
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


def _unary(method: Callable[[bytes], Awaitable[Message]]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that turns what ``method`` raises into a status."""

    async def handle(data: bytes, context: _Context) -> bytes:
        try:
            return (await method(data)).SerializeToString()
        except Exception as error:  # one place where every exception becomes a status
            await abort(context, as_fault(error, f"{method.__name__} failed"))

    return grpc.unary_unary_rpc_method_handler(handle)


def _parse(kind: type[_MessageT], data: bytes) -> _MessageT:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Fault(
            Reason.MALFORMED_TENSOR, f"not a {kind.__name__}: {len(data)} bytes do not parse"
        ) from None


def _check_protocol(version: str) -> None:
    if version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
        raise Fault(
            Reason.INCOMPATIBLE_PROTOCOL,
            f"the client speaks protocol {version or '(none)'}, this server {PROTOCOL_VERSION}; "
            "their major versions must agree",
            "protocol_version",
        )


def _check_metrics(all_metrics: Sequence[pb.EpisodeMetrics]) -> None:
    for index, metrics in enumerate(all_metrics):
        if len(metrics.values) > MAX_METRICS:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"expected at most {MAX_METRICS} names in one episode, got {len(metrics.values)}; "
                "report fewer",
                f"metrics[{index}].values",
            )
        for name, value in metrics.values.items():
            if len(name) > MAX_METRIC_NAME:
                raise Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"expected names of at most {MAX_METRIC_NAME} characters, got one of "
                    f"{len(name)} that begins with {name[:32]!r}",
                    f"metrics[{index}].values",
                )
            if not math.isfinite(value):
                raise Fault(
                    Reason.NOT_FINITE,
                    f"expected a finite number, got {value}",
                    f"metrics[{index}].values[{name!r}]",
                )


def _draining() -> Fault:
    return Fault(Reason.DRAINING, "the server is stopping; connect again later", retry_after_s=1.0)
