"""``NoisePool``: random numbers for a policy's rows, drawn in bulk, which is cheapest.

One thread at a time. N is the number of rows.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from client_sdk.policy_spec import NoiseSpec

_POOL_NUMBERS: Final = 8192


class NoisePool:
    """Random numbers for one policy's rows, drawn in bulk. One thread at a time.

    All versions of a policy share one pool: what it gives depends on the policy's noise only.

    Attributes:
        spec: Which numbers.
    """

    def __init__(self, spec: NoiseSpec, rng: np.random.Generator | None = None) -> None:
        self.spec = spec
        self._rng = np.random.default_rng() if rng is None else rng
        self._rows = max(1, _POOL_NUMBERS // max(1, spec.size))
        self._greedy = np.full((1, spec.size), spec.greedy, np.float32)
        self._greedy.setflags(write=False)
        self._pool = np.empty((0, spec.size), np.float32)
        self._next = 0

    def take(self, greedy: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Noise for the next rows.

        Args:
            greedy: ``[N]``; which rows get the likeliest action instead of a sampled one.

        Returns:
            ``[N, size]``, not to be written to.
        """
        n = len(greedy)
        if n == 1 and greedy[0]:
            return self._greedy
        start = self._next
        self._next = end = start + n
        if end > len(self._pool):
            # A new array: rows given out earlier stay what they are.
            self._pool = self._draw(max(n, self._rows))
            start, self._next = 0, n
        rows = self._pool[start : start + n]
        if n > 1 and np.count_nonzero(greedy):
            rows = np.where(greedy[:, None], self._greedy, rows)
        return rows

    def _draw(self, rows: int) -> NDArray[np.float32]:
        shape = (rows, self.spec.size)
        if self.spec.kind == "normal":
            return self._rng.standard_normal(shape, np.float32)
        if self.spec.kind == "uniform":
            return self._rng.random(shape, np.float32)
        # -log(Exp(1)) is Gumbel(0, 1). An exact 0 would become infinite.
        drawn = self._rng.standard_exponential(shape, np.float32)
        np.maximum(drawn, np.finfo(np.float32).tiny, out=drawn)
        np.log(drawn, out=drawn)
        return np.negative(drawn, out=drawn)
