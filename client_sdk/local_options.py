"""What a client can be told about local inference. No I/O."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Self

from client_sdk.errors import InvalidValueError
from client_sdk.values import check_type, is_whole


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """How local inference keeps policies and experience."""

    update_interval: float | None = 0.0
    """At least so many seconds between fetches of the policy; 0: as soon as there is another; None:
    only when asked to."""
    cache_dir: Path | None = None
    """For policy files; None: in memory only."""
    spool_dir: Path | None = None
    """For experience that does not fit into memory; None: in memory only."""
    spool_bytes: int = 256 * 2**20
    """Of experience that the server has not delivered yet; beyond that the oldest is lost."""

    @classmethod
    def checked(
        cls,
        inference_mode: str,
        update_interval: float | None,
        cache_dir: str | PathLike[str] | None,
        spool_dir: str | PathLike[str] | None,
        spool_bytes: int | None,
    ) -> Self | None:
        """Those options, from a client's arguments; None: remote inference.

        Raises:
            InvalidValueError: They have no meaning with remote inference, or none at all.
        """
        given = {"cache_dir": cache_dir, "spool_dir": spool_dir, "spool_bytes": spool_bytes}
        if inference_mode != "local":
            for field, value in given.items():
                if value is not None:
                    raise InvalidValueError(
                        f'expected None, got {value!r}: it is for inference_mode="local"',
                        field=field,
                    )
            return None
        for field in ("cache_dir", "spool_dir"):
            kinds = (str, PathLike, type(None))
            check_type(given[field], kinds, "the path of a directory, or None", field)
        options = cls(
            update_interval,
            None if cache_dir is None else Path(cache_dir),
            None if spool_dir is None else Path(spool_dir),
        )
        if spool_bytes is None:
            return options
        if not (is_whole(spool_bytes) and spool_bytes >= 1):
            raise InvalidValueError(
                f"expected a positive number of bytes, got {spool_bytes!r}", field="spool_bytes"
            )
        return dataclasses.replace(options, spool_bytes=spool_bytes)
