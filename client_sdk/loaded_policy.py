"""``LoadedPolicy``: a policy file that a client acts with, ready for any number of rows.

Made by the feed's thread, immutable to everyone else; ``act`` is for one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from client_sdk.errors import InvalidValueError
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns

if TYPE_CHECKING:
    from client_sdk.onnx_policy import BoundPolicy, OnnxPolicy

_MAX_BOUND: Final = 8
"""Numbers of rows that a policy keeps memory for."""


class LoadedPolicy:
    """A policy file, ready to act; ``act`` is for one thread at a time.

    Attributes:
        policy_id: As the server calls it.
        version: RLlib's weights sequence number.
        sha256: Of the file: what it is known by.
        session: The number of the session that brought it.
        recorded: Names of the outputs that belong into the experience.
    """

    __slots__ = ("_bound", "_onnx", "policy_id", "recorded", "session", "sha256", "version")

    def __init__(self, header: pb.PolicyHeader, onnx: OnnxPolicy, session: int) -> None:
        self.policy_id = header.policy_id
        self.version = header.policy_version
        self.sha256 = header.sha256
        self.session = session
        self.recorded = onnx.spec.recorded
        self._onnx = onnx
        self._bound: dict[int, BoundPolicy] = {}

    def act(
        self, observations: Columns, greedy: NDArray[np.bool_]
    ) -> tuple[Columns, Columns, dict[str, NDArray[Any]]]:
        """See ``OnnxPolicy.act``. The next call overwrites what this one returned."""
        n = len(greedy)
        bound = self._bound.get(n)
        if bound is None:
            if len(self._bound) >= _MAX_BOUND:
                self._bound.clear()
            bound = self._bound[n] = self._onnx.bind(n)
        return bound.act(observations, greedy)


def import_onnx_policy() -> Any:
    """The module that runs policies; loaded by whoever acts locally only.

    Raises:
        InvalidValueError: onnxruntime is not installed.
    """
    try:
        from client_sdk import onnx_policy
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnxruntime":
            raise
        raise InvalidValueError(
            '"local" needs onnxruntime, which is not installed here: '
            'pip install "policy-server[local]"',
            field="inference_mode",
        ) from None
    return onnx_policy
