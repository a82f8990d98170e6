"""Makes up for weights that RLlib loses on their way to a remote runner.

RLlib sends weights to remote runners without looking whether they arrive, and sends none while an
earlier ``set_state`` is under way: right after a restore, a runner may act with random weights for
a whole iteration. But once per iteration, and at the end of a restore, it collects the connector
states of all runners, has the local runner's pipeline merge them, and sends back the result. That
round trip tells which weights each runner has, and brings newer ones to who missed them.

Actor thread only; on the driver, its main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.rllib.connectors.env_to_module.env_to_module_pipeline import EnvToModulePipeline
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

_KEY = "policy_server"
"""Beside the names of connectors in the state of a pipeline; RLlib's own ignores it."""

NO_WEIGHTS = -1
"""Reported by a runner that has none yet."""


def report(pipeline_state: dict[str, Any], seq_no: int) -> None:
    """Put into a pipeline's state which weights its runner has."""
    pipeline_state[_KEY] = {WEIGHTS_SEQ_NO: seq_no}


def weights_in(pipeline_state: dict[str, Any]) -> dict[str, Any] | None:
    """Weights with their number, if a driver sent some along."""
    carried: dict[str, Any] = pipeline_state.get(_KEY, {})
    return carried if COMPONENT_RL_MODULE in carried else None


class DriverPipeline(EnvToModulePipeline):
    """The local runner's pipeline, where there are remote ones."""

    def __init__(
        self,
        pipeline: EnvToModulePipeline,
        seq_no: Callable[[], int],
        weights: Callable[[], dict[str, Any]],
    ) -> None:
        """Take the place of a pipeline.

        Args:
            pipeline: Its connectors move here.
            seq_no: RLlib's number of the weights that the local runner has.
            weights: These weights.
        """
        super().__init__(
            pipeline.input_observation_space,
            pipeline.input_action_space,
            connectors=pipeline.connectors,
        )
        self._seq_no = seq_no
        self._weights = weights

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """See ``ConnectorV2``; the result brings weights along if some runner's are older.

        RLlib's own takes the first state for the first connector's, though connectors without
        state are not among them.
        """
        merged: dict[str, Any] = {}
        for connector in self.connectors:
            name = type(connector).__name__
            own = [state[name] for state in states if name in state]
            if own:
                merged[name] = connector.merge_states(own)
        reported = [state[_KEY][WEIGHTS_SEQ_NO] for state in states if _KEY in state]
        if reported and min(reported) < self._seq_no():
            merged[_KEY] = {WEIGHTS_SEQ_NO: self._seq_no(), COMPONENT_RL_MODULE: self._weights()}
        return merged
