"""``RemoteShell``: what both remote environments are beside resets and steps.

Their hold on a ``RemoteClient``: shown frames, statistics, and a warning where nobody closed them.
One thread at a time.
"""

from __future__ import annotations

from typing import Any

from client_sdk.remote_client import RemoteClient


class RemoteShell:
    """Mixed into a Gymnasium environment, ahead of Gymnasium's own class.

    Attributes:
        metadata: Of the environment.
    """

    metadata: dict[str, Any]
    _remote: RemoteClient | None = None  # also where connecting failed: __del__ asks

    def _open(self) -> RemoteClient:
        if self._remote is None:
            raise AttributeError(f"this {type(self).__name__} was never connected")
        return self._remote

    def _show(self) -> None:
        """In mode ``"human"`` draw the first environment anew."""
        remote = self._open()
        if remote.viewer is not None:
            with remote.guard:
                remote.viewer.show(remote.frame(0), self.metadata.get("render_fps"))

    @property
    def connected(self) -> bool:
        """Whether the environment is there, as far as this side knows; else ``reset`` makes it."""
        remote = self._open()
        return not remote.guard.closed and remote.driver.connected

    @property
    def traffic(self) -> dict[str, int]:
        """Messages and bytes of resets and steps since it was connected; read it for statistics."""
        return self._open().driver.traffic.snapshot()

    def __repr__(self) -> str:
        where = "nowhere" if self._remote is None else self._remote.address
        return f"<{type(self).__name__} at {where}>"

    __str__ = __repr__

    def __getstate__(self) -> object:
        # A copy would close the environment of the original at its own end.
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: the environment on the host is "
            "for this object alone. Make another one where it is needed"
        )

    def __del__(self) -> None:
        if self._remote is not None:
            self._remote.forget(self)
