"""How closely a policy file and RLlib's own module agree, measured on random observations.

Pure; any thread. N is the number of observations.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Final

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire.batches import SpaceCodec
from policy_server.onnx_engine.check import (
    LOGP_TOLERANCE,
    TOLERANCE,
    check_executed,
    exact_logp,
    module_inputs,
    probe,
    rllib_inputs,
    run_all,
)
from policy_server.rl_module_engine import frozen_pipeline

ROWS: Final = 1000
_ROUNDINGS: Final = 10.0
"""So many times RLlib's own rounding may be between two ways to compute the same."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """What was measured."""

    inputs_role: str
    """``action_dist_inputs``, or ``q_values``."""
    inputs_difference: float
    """Largest difference of those, in relation to the largest magnitude."""
    rounding: float
    """Likewise, of RLlib's own from what it gives in double precision."""
    greedy_equal: float
    """Share of observations with the same greedy action."""
    greedy_wrong: int
    """How many of the others are no ties: the chosen action is worse by more than the tolerance."""
    logp_difference: float | None
    """Largest difference of sampled actions' log-densities; None where the policy has none."""

    @property
    def passes(self) -> bool:
        """Whether the file may stand for the module."""
        # Written so that NaN fails too.
        return (
            self.inputs_difference <= max(TOLERANCE, _ROUNDINGS * self.rounding)
            and not self.greedy_wrong
            and (self.logp_difference is None or self.logp_difference <= LOGP_TOLERANCE)
        )


def measure(
    policy: OnnxPolicy,
    module: Any,
    env_to_module: Any,
    module_to_env: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
) -> Parity:
    """Compare a policy file with the module that it was made of.

    Args:
        policy: The file, loaded.
        module: Not changed, and neither are the pipelines.
        env_to_module: In the state that the file was made with.
        module_to_env: What turns the module's actions into the application's.
        observation_space: Of the application's observations.
        action_space: Of the actions that it executes.

    Raises:
        NotExportableError: The file does not run, or scales actions otherwise than RLlib.
    """
    rng = np.random.default_rng(2)
    codec = SpaceCodec(observation_space)
    distribution, pool = policy.spec.distribution, NoisePool(policy.spec.noise, rng)
    columns = probe(codec, ROWS, rng)
    batch = module_inputs(module, frozen_pipeline(env_to_module), codec, columns, ROWS)
    role, inputs = rllib_inputs(distribution, module, batch)
    largest = max(1.0, _largest(inputs))
    rounding = _rounding(distribution, module, batch, inputs) / largest
    noise = pool.take(np.zeros(ROWS, np.bool_))
    sampled = run_all(policy, columns, noise)
    check_executed(module_to_env, action_space, sampled)
    greedy = run_all(policy, columns, pool.take(np.ones(ROWS, np.bool_)))["actions"]
    tolerance = max(TOLERANCE, _ROUNDINGS * rounding) * largest
    equal, wrong = _compare_greedy(greedy, inputs, distribution, action_space, tolerance)
    logp = exact_logp(distribution, module, noise, sampled)
    return Parity(
        role,
        _largest(sampled[role] - inputs) / largest,
        rounding,
        float(equal.mean()),
        int(wrong.sum()),
        None if logp is None else _largest(sampled["action_logp"] - logp),
    )


def _rounding(
    distribution: str, module: Any, batch: dict[str, Any], inputs: NDArray[np.float32]
) -> float:
    """How far single precision takes RLlib from itself.

    Much where many large numbers are summed, as of images that nobody has scaled: no other runtime,
    which sums in another order, agrees with it any better.
    """
    doubled = {
        key: value.double() if torch.is_floating_point(value) else value
        for key, value in batch.items()
    }
    _, exact = rllib_inputs(distribution, copy.deepcopy(module).double(), doubled)
    return _largest(inputs - exact)


def _compare_greedy(
    actions: NDArray[Any],
    inputs: NDArray[np.float32],
    distribution: str,
    space: gym.Space[Any],
    tolerance: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which actions are RLlib's likeliest, and which are worse than a tie; ``[N]`` each."""
    if isinstance(space, gym.spaces.Box):
        mean = inputs[:, : space.shape[0]]
        # RLlib's own greedy action of SAC is not squashed; see docs/onnx.md.
        likeliest = np.tanh(mean) if distribution == "squashed_gaussian" else mean
        equal = (np.abs(actions - likeliest) <= tolerance).all(axis=-1)
        return equal, ~equal
    sizes = space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else [inputs.shape[-1]]
    equal, wrong = np.ones(len(inputs), np.bool_), np.zeros(len(inputs), np.bool_)
    parts = np.split(inputs, np.cumsum(sizes)[:-1], axis=-1)
    for part, chosen in zip(parts, actions.reshape(len(inputs), -1).T, strict=True):
        best = part.max(axis=-1)
        equal &= part.argmax(axis=-1) == chosen
        wrong |= ~(best - part[np.arange(len(part)), chosen] <= tolerance)
    return equal, wrong


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values).max(initial=0.0))
