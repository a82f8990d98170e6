"""The application's own actions (``log_action``), as RLlib wants to learn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from policy_server.experience import InferredBatch

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns

LOGP = "action_logp"


class LoggedActions:
    """Puts logged actions, given in the action space, into the module's terms.

    With ``normalize_actions`` RLlib's modules act in [-1, 1] where the space is a bounded Box
    (``ray.rllib.utils.spaces.space_utils.normalize_action``). Scaling an action by
    ``2 / (high - low)`` scales its density by the inverse, so its log-density grows by
    ``sum(log((high - low) / 2))``.
    """

    def __init__(self, space: gym.Space[Any], *, normalize: bool) -> None:
        self._space = space
        self._scale: NDArray[np.float64] | None = None
        if (
            normalize
            and isinstance(space, gym.spaces.Box)
            and np.issubdtype(space.dtype, np.floating)
            and space.is_bounded()
        ):
            self._scale = (space.high.astype(np.float64) - space.low) / 2.0

    def module_actions(self, actions: Columns) -> Columns:
        """Actions of the space, ``[N, ...]`` by leaf, as the module would have given them."""
        space = self._space
        if self._scale is not None and isinstance(space, gym.spaces.Box):
            scaled = (actions[""] - space.low) / self._scale - 1.0
            return {"": scaled.astype(np.float32)}
        if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
            return {"": actions[""] - space.start}
        return actions

    def module_logps(self, logps: NDArray[np.float64]) -> NDArray[np.float32]:
        """Log-densities ``[N]`` of those actions, in the module's terms."""
        if self._scale is not None:
            logps = logps + np.log(self._scale).sum()
        return logps.astype(np.float32)

    def substitute(
        self, batch: InferredBatch, actions: Columns, logps: NDArray[np.float64] | None
    ) -> InferredBatch:
        """What the policy said of these observations, with the application's actions instead."""
        outputs = dict(batch.outputs)
        if logps is not None and LOGP in outputs:
            outputs[LOGP] = self.module_logps(logps)
        return InferredBatch(
            batch.policy, batch.observations, self.module_actions(actions), actions, outputs
        )
