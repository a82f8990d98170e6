"""Local inference, put together: whether there is any, what clients are told, who waits for what.

Loop thread only.
"""

from __future__ import annotations

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.downloads import Downloads


class LocalInference:
    """What a server offers to clients that act alone.

    Attributes:
        downloads: Answers ``GetPolicy``.
    """

    def __init__(
        self, downloads: Downloads, *, impossible: str | None, steps_per_upload: int, hold: bool
    ) -> None:
        """Prepare.

        Args:
            downloads: Answers ``GetPolicy``.
            impossible: Why there is no local inference here; None where there is.
            steps_per_upload: Told to clients.
            hold: The server learns on-policy: answers to uploads wait while it does.
        """
        self.downloads = downloads
        self._impossible = impossible
        self._steps_per_upload = steps_per_upload
        self._hold = hold

    def check_possible(self, field: str = "") -> None:
        """Refuse clients that act alone, where no file of the policy can be had.

        Raises:
            Fault: NO_LOCAL_INFERENCE, with the reason.
        """
        if self._impossible is not None:
            raise Fault(
                Reason.NO_LOCAL_INFERENCE,
                "this server serves remote inference only, for its policy has no ONNX file "
                f"({self._impossible}); open the session with INFERENCE_MODE_REMOTE",
                field,
            )

    def greet(self, response: pb.OpenSessionResponse) -> None:
        """Tell a client what it needs to know to act alone."""
        response.steps_per_upload = self._steps_per_upload
        response.holds = self._hold

    def cancel(self, fault: Fault) -> None:
        """End all calls that wait."""
        self.downloads.files.cancel(fault)
