"""``EnvConnection``: every rpc of ``EnvService``, blocking. No retries here, and no meaning.

One thread at a time; frames may be read by another.
"""

from __future__ import annotations

from collections.abc import Iterator

from client_sdk.channel import Channel, Stream
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.wire import HANDLE_HEADER
from client_sdk.wire import policyserver_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["EnvService"].full_name


class EnvConnection:
    """A channel to one host of environments."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = Channel(endpoint, _SERVICE)

    def make(self, request: pb.MakeRequest, timeout_s: float) -> pb.MakeResponse:
        """Call ``Make``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return self._channel.unary("Make", request, pb.MakeResponse, timeout_s)

    def reset(self, request: pb.ResetRequest, timeout_s: float) -> pb.ResetResponse:
        """Call ``Reset``; raises as ``make``."""
        return self._channel.unary("Reset", request, pb.ResetResponse, timeout_s)

    def step(self, request: pb.StepRequest, timeout_s: float) -> pb.StepResponse:
        """Call ``Step``; raises as ``make``."""
        return self._channel.unary("Step", request, pb.StepResponse, timeout_s)

    def drive(self, handle: str) -> Dialogue | Stream:
        """Call ``Drive``: the environments of that handle live as long as it does."""
        return self._channel.dialogue("Drive", ((HANDLE_HEADER, handle),))

    def render(self, request: pb.RenderRequest, timeout_s: float) -> pb.RenderResponse:
        """Call ``Render``; raises as ``make``."""
        return self._channel.unary("Render", request, pb.RenderResponse, timeout_s)

    def stream_frames(
        self, request: pb.StreamFramesRequest, timeout_s: float | None
    ) -> Iterator[pb.StreamFramesResponse]:
        """Call ``StreamFrames``; raises as ``make``, while read.

        Closing the iterator cancels the call.
        """
        return self._channel.parts("StreamFrames", request, pb.StreamFramesResponse, timeout_s)

    def close(self, request: pb.CloseRequest, timeout_s: float) -> pb.CloseResponse:
        """Call ``Close``; raises as ``make``."""
        return self._channel.unary("Close", request, pb.CloseResponse, timeout_s)

    def disconnect(self) -> None:
        """Close the channel, and whatever runs on it."""
        self._channel.close()
