"""The policy files that clients act with: which there are, and who waits for another.

Loop thread only. The newest files stay loadable; of many earlier ones only is kept what experience
needs that was made with them: which version it was, and how the learner sees its observations.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

from client_sdk.wire.faults import Fault, Reason
from policy_server.waiting import Waiting

if TYPE_CHECKING:
    from client_sdk.onnx_policy import OnnxPolicy
    from policy_server.learner_view import LearnerView

_RETRY_AFTER_S = 0.1
_RESTORING_S = 5.0
"""A training that resumes publishes new weights first, and so much later at most its checkpoint's."""
_MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Of files that stay loaded; each costs about twice its size."""
_LEAST_KEPT = 2
"""Whatever their size: the version before is what most uploads name."""


class ExportedPolicy(Protocol):
    """A policy of the ONNX engine, as its publisher made it."""

    version: int
    view: LearnerView
    model: bytes
    sha256: bytes
    onnx: OnnxPolicy


class PolicyFile:
    """One version's file, and the policy that experience made with it refers to.

    Attributes:
        version: RLlib's weights sequence number.
        view: How the learner sees observations of this version.
        sha256: Of the complete file.
        exported: The file itself; None once it is too old to be kept.
    """

    __slots__ = ("exported", "sha256", "version", "view")

    def __init__(self, exported: ExportedPolicy) -> None:
        self.version = exported.version
        self.view = exported.view
        self.sha256 = exported.sha256
        self.exported: ExportedPolicy | None = exported


class PolicyFiles:
    """All files of this server by what they are known by, their SHA-256.

    Attributes:
        newest: None until the first one is published.
        forgotten_version: Of the newest file that is no longer remembered; -1 if all are.
    """

    def __init__(self, *, max_kept: int, max_remembered: int) -> None:
        """Nothing is published yet.

        Args:
            max_kept: Files that stay loaded, the newest one among them; fewer of large ones.
            max_remembered: Files that experience may still name.
        """
        self._max_kept = max_kept
        self._max_remembered = max_remembered
        self._files: OrderedDict[bytes, PolicyFile] = OrderedDict()
        self._kept: deque[PolicyFile] = deque()
        self._kept_bytes = 0
        self._waits: set[Waiting] = set()
        self._restored_by = 0.0
        self.newest: PolicyFile | None = None
        self.forgotten_version = -1

    def add(self, exported: ExportedPolicy) -> None:
        """A version was published; one that is no news is ignored."""
        if self.newest is not None and exported.version <= self.newest.version:
            return
        if self.newest is None:
            self._restored_by = time.monotonic() + _RESTORING_S
        self.newest = self._files[exported.sha256] = PolicyFile(exported)
        if len(self._files) > self._max_remembered:
            _, forgotten = self._files.popitem(last=False)
            self.forgotten_version = forgotten.version
        self._kept.append(self.newest)
        self._kept_bytes += len(exported.model)
        while len(self._kept) > self._max_kept or (
            self._kept_bytes > _MAX_KEPT_BYTES and len(self._kept) > _LEAST_KEPT
        ):
            old = self._kept.popleft()
            if old.exported is not None:
                self._kept_bytes -= len(old.exported.model)
            old.exported = None
        waits, self._waits = self._waits, set()
        for wait in waits:
            wait.wake()

    def find(self, sha256: bytes) -> PolicyFile | None:
        """The file of that hash, if it is remembered."""
        return self._files.get(sha256)

    def cancel(self, fault: Fault) -> None:
        """End all that wait."""
        for wait in self._waits:
            wait.end(fault)

    @property
    def waiting(self) -> int:
        """Calls that wait for another file."""
        return len(self._waits)

    async def other_than(self, sha256: bytes, wait_s: float, wait: Waiting) -> PolicyFile:
        """The newest file, as soon as it is not that one.

        Args:
            sha256: Of the file that the caller has; empty for none.
            wait_s: Give up after this long.
            wait: The call that this is for.

        Returns:
            The newest file; the caller's own, if there was no other in time.

        Raises:
            Fault: NOT_READY; there is none at all. Or what the call was ended with.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while self.newest is None or self.newest.sha256 == sha256:
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            self._waits.add(wait)
            try:
                await wait.news(left_s)
            finally:
                self._waits.discard(wait)
        if self.newest is None:
            raise Fault(
                Reason.NOT_READY,
                "no policy yet: RLlib has not sent its first weights; ask again",
                retry_after_s=_RETRY_AFTER_S,
            )
        return self.newest

    async def restored(self, version: int, wait: Waiting) -> None:
        """Wait for a version of a server before this one, while it may still come from a checkpoint.

        Args:
            version: That the caller has heard of.
            wait: The call that this is for.

        Raises:
            Fault: What the call was ended with.
        """
        while self.newest is not None and version > self.newest.version:
            left_s = self._restored_by - time.monotonic()
            if left_s <= 0:
                return
            self._waits.add(wait)
            try:
                await wait.news(left_s)
            finally:
                self._waits.discard(wait)
