"""Whether uploaded steps were really made with the policy file that they name.

A few rows of a chunk are run through that file again: the distribution inputs must come out the
same, and the log-densities must be those of the uploaded actions. Loop thread only; T is a chunk's
number of steps, N that of the rows looked at, d and k the action space's own dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.wire.faults import Fault, Reason
from policy_server.actions import LOGP

if TYPE_CHECKING:
    from client_sdk.onnx_policy import OnnxPolicy
    from client_sdk.wire.batches import Columns

DIST_INPUTS = "action_dist_inputs"

_ROWS = 8
_TOLERANCE = 1e-3
"""Of distribution inputs, relative to the largest of a row: between runtimes they differ by a
hundredth of this, and all by as much, for they are sums over the same last layer."""
_LOGP_TOLERANCE = 1e-2
"""Of log-densities, on top of what the rounding of actions makes."""
_ROUNDING = 4 * float(np.finfo(np.float32).eps)
_SATURATED = 1.0 - 1e-6
"""A tangent beyond could have come from anywhere."""
_MOST_DEVIATIONS = 12.0
"""Of a normal variable; as likely as 1e-33."""
_SAC_LOG_STD = (-20.0, 2.0)
"""Bounds of RLlib's squashed Gaussian: MIN_LOG_NN_OUTPUT, MAX_LOG_NN_OUTPUT."""

_Floats = NDArray[np.float64]
_Density = Callable[[_Floats, NDArray[Any]], tuple[_Floats, _Floats]]
"""Distribution inputs and actions to log-densities and how far rounding may move them, ``[N]``."""


class PolicyCheck:
    """Knows the densities of one action space."""

    def __init__(self, action_space: gym.Space[Any]) -> None:
        self._densities: dict[str, _Density] = {
            "categorical": _categorical,
            "diag_gaussian": _diag_gaussian,
            "squashed_gaussian": _squashed_gaussian,
        }
        if isinstance(action_space, gym.spaces.MultiDiscrete):
            sizes = [int(n) for n in action_space.nvec.ravel()]
            self._densities["multi_categorical"] = functools.partial(_multi_categorical, sizes)

    def check(
        self,
        policy: OnnxPolicy,
        observations: Columns,
        actions: NDArray[Any],
        outputs: dict[str, NDArray[Any]],
        field: str,
    ) -> None:
        """Look at a few steps of a chunk.

        Args:
            policy: The file that the chunk names.
            observations: Raw, by leaf, ``[T, ...]``.
            actions: As the graph gave them, ``[T, ...]``.
            outputs: By role, ``[T, ...]``. Where the algorithm records no distribution inputs, only
                SAC's actions are looked at: whether the policy could have come to them.
            field: Path to the chunk.

        Raises:
            Fault: POLICY_MISMATCH.
        """
        given = outputs.get(DIST_INPUTS)
        squashed = policy.spec.distribution == "squashed_gaussian"
        if given is None and not squashed:
            return
        rows = np.unique(np.linspace(0, len(actions) - 1, _ROWS).astype(np.intp))
        noise = policy.spec.noise
        (expected,) = policy.run(
            {path: column[rows] for path, column in observations.items()},
            np.full((len(rows), noise.size), noise.greedy, np.float32),
            (DIST_INPUTS,),
        )
        if given is None:
            _check_reachable(expected.astype(np.float64), actions[rows], rows, f"{field}.actions")
            return
        inputs = given[rows].astype(np.float64)
        largest = np.abs(expected).max(axis=-1, keepdims=True, initial=1.0)
        off = np.abs(inputs - expected) > _TOLERANCE * largest
        if off.any():
            row, at = np.argwhere(off)[0].tolist()
            raise _mismatch(
                f"at step {rows[row]} the policy file of version {policy.version} gives "
                f"{expected[row, at]:.6g} at [{at}], the chunk says {inputs[row, at]:.6g}. Name the "
                "policy file that really acted, and upload the observations as it saw them",
                f'{field}.outputs["{DIST_INPUTS}"]',
            )
        density = self._densities.get(policy.spec.distribution)
        logps = outputs.get(LOGP)
        if density is None or logps is None:
            return
        densities, rounding = density(inputs, actions[rows])
        tolerance = _LOGP_TOLERANCE + _TOLERANCE * np.abs(densities) + rounding
        wrong = np.abs(logps[rows] - densities) > tolerance
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise _mismatch(
                f"at step {rows[row]} the uploaded action has the log-density "
                f"{densities[row]:.6g} under the policy, the chunk says {logps[rows[row]]:.6g}. "
                'Upload the graph\'s output "actions", not "env_actions", and the "action_logp" of '
                "the same run; set logged where the application chose the action itself",
                f"{field}.actions",
            )


def _mismatch(message: str, field: str) -> Fault:
    return Fault(Reason.POLICY_MISMATCH, message, field)


def _categorical(logits: _Floats, actions: NDArray[Any]) -> tuple[_Floats, _Floats]:
    """``[N, n]`` and ``[N]``."""
    highest = logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
    chosen = np.take_along_axis(logits, actions[:, None].astype(np.intp), axis=-1)[:, 0]
    return chosen - normalizer, np.zeros(len(logits))


def _multi_categorical(
    sizes: list[int], logits: _Floats, actions: NDArray[Any]
) -> tuple[_Floats, _Floats]:
    """``[N, sum of sizes]`` and ``[N, k]``."""
    parts = np.split(logits, np.cumsum(sizes)[:-1], axis=-1)
    flat = actions.reshape(len(actions), -1)
    logps = [_categorical(part, flat[:, index])[0] for index, part in enumerate(parts)]
    return np.sum(logps, axis=0), np.zeros(len(logits))


def _diag_gaussian(inputs: _Floats, actions: NDArray[Any]) -> tuple[_Floats, _Floats]:
    """``[N, 2 d]`` and ``[N, d]``."""
    mean, log_std = np.split(inputs, 2, axis=-1)
    return _gaussian(mean, log_std, actions.astype(np.float64), _ROUNDING * np.abs(actions))


def _squashed_gaussian(inputs: _Floats, actions: NDArray[Any]) -> tuple[_Floats, _Floats]:
    """The same for the hyperbolic tangents of such numbers; Haarnoja et al. 2018, appendix C."""
    mean, log_std = np.split(inputs, 2, axis=-1)
    log_std = np.clip(log_std, *_SAC_LOG_STD)
    tanh = np.clip(actions.astype(np.float64), -_SATURATED, _SATURATED)
    slope = 1.0 - np.square(tanh)
    logps, rounding = _gaussian(mean, log_std, np.arctanh(tanh), _ROUNDING / slope)
    rounding = rounding + (_ROUNDING / slope).sum(axis=-1)
    rounding[(np.abs(actions) > _SATURATED).any(axis=-1)] = np.inf
    return logps - np.log(slope).sum(axis=-1), rounding


def _check_reachable(
    inputs: _Floats, actions: NDArray[Any], rows: NDArray[np.intp], field: str
) -> None:
    """Hyperbolic tangents ``[N, d]`` of what is not too many deviations from the mean."""
    mean, log_std = np.split(inputs, 2, axis=-1)
    magnitude = np.abs(actions)
    tanh = np.clip(actions.astype(np.float64), -_SATURATED, _SATURATED)
    deviations = np.abs(np.arctanh(tanh) - mean) / np.exp(np.clip(log_std, *_SAC_LOG_STD))
    error = _ROUNDING / (1.0 - np.square(tanh)) / np.exp(np.clip(log_std, *_SAC_LOG_STD))
    off = (magnitude > 1.0 + _ROUNDING) | (  # runtimes give tangents a little beyond 1
        (magnitude < _SATURATED)
        & (deviations - error > _MOST_DEVIATIONS + _TOLERANCE * np.abs(mean))
    )
    if off.any():
        row, at = np.argwhere(off)[0].tolist()
        raise _mismatch(
            f"at step {rows[row]} the policy cannot have given {actions[row, at]:.6g} at [{at}]: its "
            f"actions are around {np.tanh(mean[row, at]):.6g}, between -1 and 1. Upload the graph's "
            'output "actions", not "env_actions"; set logged where the application chose the action '
            "itself",
            field,
        )


def _gaussian(
    mean: _Floats, log_std: _Floats, x: _Floats, error: _Floats
) -> tuple[_Floats, _Floats]:
    std = np.exp(log_std)
    z = (x - mean) / std
    logps = -0.5 * np.square(z) - log_std - 0.5 * np.log(2.0 * np.pi)
    z_error = (error + _ROUNDING * np.abs(mean)) / std
    rounding = np.abs(z) * z_error + 0.5 * np.square(z_error)
    return logps.sum(axis=-1), rounding.sum(axis=-1)
