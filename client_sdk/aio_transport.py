"""``AioConnection``: ``PolicyService`` on ``grpc.aio``, as ``transport`` is blocking.

One event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from client_sdk.aio_channel import AioChannel, AioStream
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.transport import SERVICE
from client_sdk.wire import policyserver_pb2 as pb


class AioConnection:
    """A channel to one server: every rpc of the contract. One event loop."""

    def __init__(self, endpoint: Endpoint, target: Address | None = None) -> None:
        self._channel = AioChannel(endpoint, SERVICE, target)

    async def open_session(
        self, request: pb.OpenSessionRequest, timeout_s: float
    ) -> pb.OpenSessionResponse:
        """Call ``OpenSession``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return await self._channel.unary("OpenSession", request, pb.OpenSessionResponse, timeout_s)

    async def close_session(
        self, request: pb.CloseSessionRequest, timeout_s: float
    ) -> pb.CloseSessionResponse:
        """Call ``CloseSession``; raises as ``open_session``."""
        return await self._channel.unary(
            "CloseSession", request, pb.CloseSessionResponse, timeout_s
        )

    async def act(self, request: pb.ActRequest, timeout_s: float) -> pb.ActResponse:
        """Call ``Act``; raises as ``open_session``."""
        return await self._channel.unary("Act", request, pb.ActResponse, timeout_s)

    def get_policy(
        self, request: pb.GetPolicyRequest, timeout_s: float
    ) -> AsyncIterator[pb.GetPolicyResponse]:
        """Call ``GetPolicy``: a header, then pieces; raises as ``open_session``, while read."""
        return self._channel.parts("GetPolicy", request, pb.GetPolicyResponse, timeout_s)

    async def upload_episodes(
        self, request: pb.UploadEpisodesRequest, timeout_s: float
    ) -> pb.UploadEpisodesResponse:
        """Call ``UploadEpisodes``; raises as ``open_session``."""
        return await self._channel.unary(
            "UploadEpisodes", request, pb.UploadEpisodesResponse, timeout_s
        )

    def stream_act(self) -> AioStream:
        """Call ``StreamAct``."""
        return self._channel.stream("StreamAct")

    async def close(self) -> None:
        """Close the channel, and whatever runs on it."""
        await self._channel.close()
