"""``Connection``: every rpc of ``PolicyService``, blocking; see ``aio_transport`` for event loops.

Any thread. No retries here, and no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

from client_sdk.channel import Channel, Stream
from client_sdk.config import Address
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.wire import policyserver_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"].full_name


class Connection:
    """A channel to one policy server."""

    def __init__(self, endpoint: Endpoint, target: Address | None = None) -> None:
        self._channel = Channel(endpoint, SERVICE, target)

    def open_session(
        self, request: pb.OpenSessionRequest, timeout_s: float
    ) -> pb.OpenSessionResponse:
        """Call ``OpenSession``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return self._channel.unary("OpenSession", request, pb.OpenSessionResponse, timeout_s)

    def close_session(
        self, request: pb.CloseSessionRequest, timeout_s: float
    ) -> pb.CloseSessionResponse:
        """Call ``CloseSession``; raises as ``open_session``."""
        return self._channel.unary("CloseSession", request, pb.CloseSessionResponse, timeout_s)

    def act(self, request: pb.ActRequest, timeout_s: float) -> pb.ActResponse:
        """Call ``Act``; raises as ``open_session``."""
        return self._channel.unary("Act", request, pb.ActResponse, timeout_s)

    def get_policy(
        self, request: pb.GetPolicyRequest, timeout_s: float
    ) -> Iterator[pb.GetPolicyResponse]:
        """Call ``GetPolicy``: a header, then pieces; raises as ``open_session``, while read.

        Closing the iterator cancels the call.
        """
        return self._channel.parts("GetPolicy", request, pb.GetPolicyResponse, timeout_s)

    def upload_episodes(
        self, request: pb.UploadEpisodesRequest, timeout_s: float
    ) -> pb.UploadEpisodesResponse:
        """Call ``UploadEpisodes``; raises as ``open_session``."""
        return self._channel.unary("UploadEpisodes", request, pb.UploadEpisodesResponse, timeout_s)

    def stream_act(self) -> Dialogue | Stream:
        """Call ``StreamAct``."""
        return self._channel.dialogue("StreamAct")

    def close(self) -> None:
        """Close the channel, and whatever runs on it."""
        self._channel.close()
