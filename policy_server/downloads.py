"""``GetPolicy``: the newest policy's file in pieces, at once or when there is another.

Loop thread only. However many clients wait, a version is cut into messages once.
"""

from __future__ import annotations

from collections.abc import Sequence

from client_sdk.wire import policyserver_pb2 as pb
from policy_server.experience import POLICY_ID
from policy_server.policy_files import PolicyFile, PolicyFiles
from policy_server.refusals import check_policy_id
from policy_server.waiting import Waiting

PIECE_BYTES = 256 * 1024
"""Below the contract's 1 MiB: one piece may be on its way to every client at a time."""

_MAX_WAIT_S = 60.0
"""However long a client wants to wait, it is told by then that there is no other file."""


class Downloads:
    """Answers ``GetPolicy``.

    Attributes:
        files: What there is to download.
        downloads: Files handed out so far.
    """

    def __init__(self, files: PolicyFiles) -> None:
        self.files = files
        self.downloads = 0
        self._cut: tuple[bytes, list[bytes]] = (b"", [])

    async def answer(self, request: pb.GetPolicyRequest, wait: Waiting) -> Sequence[bytes]:
        """The messages to send, serialized.

        Args:
            request: From anyone.
            wait: The call.

        Raises:
            Fault: UNKNOWN_POLICY, NOT_READY, or what the call was ended with.
        """
        check_policy_id(request.policy_id, "policy_id")
        wait_s = min(request.wait.ToMicroseconds() / 1e6, _MAX_WAIT_S)
        known = request.have_sha256
        file = await self.files.other_than(known, wait_s, wait)
        if file.sha256 == known:
            return [_header(file, 0)]
        self.downloads += 1
        return self._messages(file)

    def _messages(self, file: PolicyFile) -> Sequence[bytes]:
        sha256, messages = self._cut
        if sha256 != file.sha256:
            # The newest file is always kept.
            model = file.exported.model if file.exported is not None else b""
            messages = [_header(file, len(model))]
            messages += [
                pb.GetPolicyResponse(piece=model[at : at + PIECE_BYTES]).SerializeToString()
                for at in range(0, len(model), PIECE_BYTES)
            ]
            self._cut = (file.sha256, messages)
        return messages


def _header(file: PolicyFile, size_bytes: int) -> bytes:
    header = pb.PolicyHeader(
        policy_id=POLICY_ID,
        policy_version=file.version,
        size_bytes=size_bytes,
        sha256=file.sha256,
    )
    return pb.GetPolicyResponse(header=header).SerializeToString()
