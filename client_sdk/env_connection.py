"""``EnvConnection``: every rpc of ``EnvService``, blocking. One thread at a time; no meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from client_sdk.transport import Endpoint, Stream, error_of_call
from client_sdk.wire import policyserver_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["EnvService"].full_name

_T = TypeVar("_T")


class EnvConnection:
    """A channel to one host of environments."""

    def __init__(self, endpoint: Endpoint) -> None:
        target = endpoint.address
        options, credentials = endpoint.options(target), endpoint.credentials
        self._metadata = endpoint.metadata
        self._channel = (
            grpc.insecure_channel(str(target), options)
            if credentials is None
            else grpc.secure_channel(str(target), credentials, options)
        )

    def make(self, request: pb.MakeRequest, timeout_s: float) -> pb.MakeResponse:
        """Call ``Make``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return self._unary("Make", request, pb.MakeResponse.FromString, timeout_s)

    def reset(self, request: pb.ResetRequest, timeout_s: float) -> pb.ResetResponse:
        """Call ``Reset``; raises as ``make``."""
        return self._unary("Reset", request, pb.ResetResponse.FromString, timeout_s)

    def step(self, request: pb.StepRequest, timeout_s: float) -> pb.StepResponse:
        """Call ``Step``; raises as ``make``."""
        return self._unary("Step", request, pb.StepResponse.FromString, timeout_s)

    def drive(self) -> Stream:
        """Call ``Drive``."""
        # Identity serializers: bytes are made and read by the thread that cares.
        call: Any = self._channel.stream_stream(_path("Drive"))
        return Stream(lambda requests: call(requests, metadata=self._metadata))

    def render(self, request: pb.RenderRequest, timeout_s: float) -> pb.RenderResponse:
        """Call ``Render``; raises as ``make``."""
        return self._unary("Render", request, pb.RenderResponse.FromString, timeout_s)

    def stream_frames(
        self, request: pb.StreamFramesRequest, timeout_s: float | None
    ) -> Iterator[pb.StreamFramesResponse]:
        """Call ``StreamFrames``; raises as ``make``, while read.

        Closing the iterator cancels the call.
        """
        call: Any = self._channel.unary_stream(
            _path("StreamFrames"),
            pb.StreamFramesRequest.SerializeToString,
            pb.StreamFramesResponse.FromString,
        )
        frames = call(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from frames
        except grpc.RpcError as error:
            raise error_of_call(error) from None
        finally:
            frames.cancel()

    def close(self, request: pb.CloseRequest, timeout_s: float) -> pb.CloseResponse:
        """Call ``Close``; raises as ``make``."""
        return self._unary("Close", request, pb.CloseResponse.FromString, timeout_s)

    def disconnect(self) -> None:
        """Close the channel, and whatever runs on it."""
        self._channel.close()

    def _unary(
        self, name: str, request: Any, reader: Callable[[bytes], _T], timeout_s: float
    ) -> _T:
        call = self._channel.unary_unary(_path(name), type(request).SerializeToString, reader)
        try:
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from None


def _path(name: str) -> str:
    return f"/{_SERVICE}/{name}"
