"""How acting and learning interleave for one algorithm: every "auto" resolved, once, at start.

Pure; any thread.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from policy_server.config import PolicyServerConfig

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

_LEAST_CAPACITY_STEPS = 256
"""Off-policy algorithms ask for a step or a few at a time; a buffer of twice that would be full
whenever more than two episodes run."""

_UPLOADS_PER_ROUND = 8
"""Into so many uploads one client cuts what the learner asks for."""
_MOST_STEPS_PER_UPLOAD = 1000


@dataclasses.dataclass(frozen=True)
class Semantics:
    """What the server and the hand-over have to keep to."""

    hold: bool
    """Actions for training episodes wait while RLlib learns."""
    max_policy_lag: int | None
    """Experience of more versions ago is discarded at hand-over; None: no limit."""
    logged_actions_need_logp: bool
    """The algorithm learns from the behaviour's log-density, so logged actions must bring theirs."""
    joins_chunks: bool
    """A replay buffer joins the chunks of an episode, so the observation where two of them meet
    must be the same number for number in both."""
    complete_episodes: bool
    """Running episodes are never cut."""
    fragment_steps: int
    """What one ``sample()`` call is for."""
    capacity_steps: int
    """Size of the experience buffer."""
    steps_per_upload: int
    """How many steps a client that acts alone is asked to upload at a time."""


def resolve(algorithm: AlgorithmConfig, server: PolicyServerConfig, worker_index: int) -> Semantics:
    """Decide what was left to ``"auto"``, and refuse what would be wrong.

    Args:
        algorithm: Any config of RLlib's new API stack.
        server: What was set on the policy server.
        worker_index: Of the env runner; RLlib spreads fragments over them.

    Raises:
        ValueError: Hold was asked for with an algorithm that never stops sampling.
    """
    lineage = {base.__name__ for base in type(algorithm).__mro__}
    # By name: importing IMPALA to ask for its class would cost a second in each runner.
    asynchronous = "IMPALAConfig" in lineage  # APPO's derives from it
    on_policy = "PPOConfig" in lineage and not asynchronous
    replays = hasattr(algorithm, "replay_buffer_config")

    if server.while_learning == "hold" and asynchronous:
        name = type(algorithm).__name__.removesuffix("Config")
        raise ValueError(
            f'while_learning="hold" with {name}: {name} samples and learns at the same time, so '
            'actions would be held for no reason. Use "serve" or "auto".'
        )
    hold = on_policy if server.while_learning == "auto" else server.while_learning == "hold"
    lag = server.max_policy_lag
    fragment_steps = max(
        1,
        algorithm.get_rollout_fragment_length(worker_index) * algorithm.num_envs_per_env_runner,
    )
    # What the learner asks for in a while, where a single call asks for a step or a few.
    round_steps = fragment_steps if on_policy else max(fragment_steps, _LEAST_CAPACITY_STEPS // 2)
    return Semantics(
        hold=hold,
        max_policy_lag=(1 if on_policy else None) if lag == "auto" else lag,
        logged_actions_need_logp=not replays,
        joins_chunks=replays,
        complete_episodes=algorithm.batch_mode == "complete_episodes",
        fragment_steps=fragment_steps,
        capacity_steps=max(
            math.ceil(server.buffer_fragments * fragment_steps),
            0 if on_policy else _LEAST_CAPACITY_STEPS,
        ),
        steps_per_upload=(
            min(max(1, round_steps // _UPLOADS_PER_ROUND), _MOST_STEPS_PER_UPLOAD)
            if server.steps_per_upload == "auto"
            else server.steps_per_upload
        ),
    )
