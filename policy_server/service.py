"""The gRPC methods of ``PolicyService``: decode, call, encode. No RL in here.

Loop thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from client_sdk.traffic import Traffic
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.act_stream import ActStream
from policy_server.acting import ActCall, Acting
from policy_server.announcements import check_metrics, starts_of
from policy_server.calls import Context, abort, parse, unary
from policy_server.faults import as_fault
from policy_server.handshake import Handshake
from policy_server.local import LocalInference
from policy_server.refusals import draining
from policy_server.sessions import SessionRegistry
from policy_server.waiting import Waiting

SERVICE_NAME = "policyserver.v1.PolicyService"

_MAX_NAMELESS = 1000
"""Open streams on which no request has come; beyond that the oldest is ended for each new one."""


class PolicyService:
    """Answers clients; one per server."""

    def __init__(
        self,
        *,
        sessions: SessionRegistry,
        handshake: Handshake,
        acting: Acting,
        local: LocalInference,
        traffic: Traffic,
        policy_version: Callable[[], int],
        max_open_episodes: int,
    ) -> None:
        """Put the parts together.

        Args:
            sessions: Who is connected.
            handshake: With those who want to be.
            acting: Requests for actions.
            local: Everything for clients that act alone.
            traffic: Counts messages.
            policy_version: Of the newest policy.
            max_open_episodes: Of one session.
        """
        self._sessions = sessions
        self._handshake = handshake
        self._acting = acting
        self._local = local
        self._traffic = traffic
        self._policy_version = policy_version
        self._max_open_episodes = max_open_episodes
        self._streams: dict[ActStream, None] = {}  # a set in order

    def handler(self) -> grpc.GenericRpcHandler:
        """What to register with a ``grpc.aio`` server."""
        return self._traffic.counting(
            grpc.method_handlers_generic_handler(
                SERVICE_NAME,
                {
                    "OpenSession": unary(self._open_session),
                    "CloseSession": unary(self._close_session),
                    "Act": unary(self._act),
                    "StreamAct": grpc.stream_stream_rpc_method_handler(self._stream_act),
                    "GetPolicy": grpc.unary_stream_rpc_method_handler(self._get_policy),
                    "UploadEpisodes": unary(self._upload_episodes),
                },
            )
        )

    def drain(self) -> None:
        """From now on every call is refused, and those that wait are answered so."""
        self._sessions.drain()
        self._acting.cancel(draining())
        self._local.cancel(draining())
        for stream in list(self._streams):
            stream.end(draining())

    # Sessions.

    async def _open_session(self, data: bytes) -> Message:
        request = parse(pb.OpenSessionRequest, data)
        self._sessions.check_not_draining()
        self._handshake.check(request)
        local = request.inference_mode == pb.INFERENCE_MODE_LOCAL
        session, _ = self._sessions.open(request.client_name, request.session_id, local=local)
        response = self._handshake.greeting(session, self._policy_version())
        if local:
            self._local.greet(response, len(self._sessions))
            if request.session_id != session.session_id:
                response.delivered_sequence = self._sessions.uploaded(request.session_id)
        return response

    async def _close_session(self, data: bytes) -> Message:
        request = parse(pb.CloseSessionRequest, data)
        self._sessions.close(request.session_id)
        return pb.CloseSessionResponse()

    # Acting.

    async def _act(self, data: bytes) -> Message:
        request = parse(pb.ActRequest, data)
        session = self._sessions.find(request.session_id)
        call = ActCall()
        self._sessions.admit(session, call)
        ask = None
        try:
            ask = self._acting.begin(session, request, call.answer)
            await call.answered
            return self._acting.response(ask)
        finally:
            self._sessions.leave(session, call)
            if ask is not None:
                self._acting.withdraw(ask)

    async def _stream_act(self, _requests: Any, context: Context) -> None:
        stream = ActStream(
            context,
            self._sessions,
            self._acting,
            self._traffic,
            max_open_episodes=self._max_open_episodes,
        )
        self._streams[stream] = None
        self._end_surplus()
        try:
            await stream.serve()
        except Fault as fault:
            await abort(context, fault)
        finally:
            del self._streams[stream]

    def _end_surplus(self) -> None:
        """Bound the streams that no session's limit counts, for none was named in them yet."""
        nameless = [stream for stream in self._streams if not stream.named]
        if len(nameless) > _MAX_NAMELESS:
            nameless[0].end(
                Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"more than {_MAX_NAMELESS} streams are open without a request; open yours "
                    "when there is something to ask",
                    retry_after_s=0.1,
                )
            )

    # Acting alone.

    async def _get_policy(self, data: bytes, context: Context) -> None:
        try:
            request = parse(pb.GetPolicyRequest, data)
            self._local.check_possible()
            session = self._sessions.find(request.session_id)
            call = Waiting()
            self._sessions.admit(session, call)
            try:
                for message in await self._local.downloads.answer(request, call):
                    await context.write(message)
            finally:
                self._sessions.leave(session, call)
        except Exception as error:  # as in calls.unary
            await abort(context, as_fault(error, "GetPolicy failed"))

    async def _upload_episodes(self, data: bytes) -> Message:
        request = parse(pb.UploadEpisodesRequest, data)
        session = self._sessions.find(request.session_id)
        self._local.check_possible()
        starts = starts_of(request.starts, self._max_open_episodes)
        check_metrics(request.metrics)
        call = Waiting()
        self._sessions.admit(session, call)
        try:
            return await self._local.upload(session, request, starts, call)
        finally:
            self._sessions.leave(session, call)
