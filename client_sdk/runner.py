"""``run_gymnasium``: the ready loop over a Gymnasium environment, for whoever needs no loop of their own.

Blocking; one thread, one client, one message per vector step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from client_sdk.client import PolicyClient
from client_sdk.config import Timeouts, TlsConfig
from client_sdk.errors import InvalidValueError
from client_sdk.stats import ClientStats
from client_sdk.values import is_whole

RECENT_EPISODES = 100
"""Whose mean return a summary gives."""

EnvSource = str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | Callable[[], gym.Env[Any, Any]]
"""An id, an environment, a vector of them, or something that makes one."""


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run has come to, at its end or so far."""

    episodes: int
    """Ended."""
    steps: int
    """Of all environments, resets not counted."""
    seconds: float
    """Since the first action was asked for."""
    mean_return: float
    """Of the latest 100 episodes; NaN before the first has ended."""
    mean_length: float
    """Likewise, in steps."""
    policy_version: int
    """That gave the latest action."""
    stats: ClientStats
    """What became of connections and episodes."""

    @property
    def steps_per_s(self) -> float:
        """Of all environments together."""
        return self.steps / self.seconds if self.seconds else 0.0


def run_gymnasium(
    env_or_id: EnvSource,
    address: str,
    *,
    inference_mode: str = "remote",
    num_envs: int = 1,
    episodes: int | None = None,
    training_enabled: bool = True,
    explore: bool = True,
    seed: int | None = None,
    token: str | None = None,
    tls: TlsConfig | None = None,
    insecure: bool = False,
    timeouts: Timeouts | None = None,
    name: str | None = None,
    update_interval: float | None = 0.0,
    cache_dir: str | PathLike[str] | None = None,
    spool_dir: str | PathLike[str] | None = None,
    spool_bytes: int | None = None,
    on_progress: Callable[[RunSummary], None] | None = None,
    progress_every_s: float = 10.0,
) -> RunSummary:
    """Let a policy server act in an environment until enough episodes have ended.

    Args:
        env_or_id: A Gymnasium id, an environment, a function that makes one, or a vector
            environment with NEXT_STEP autoreset. What is given here made is left open.
        address: Of the server; what follows up to ``name`` is as for ``PolicyClient``.
        inference_mode: ``"remote"`` or ``"local"``.
        num_envs: How many environments step together, where they are made here.
        episodes: End after so many; None: only with an exception, such as KeyboardInterrupt.
        training_enabled: False keeps all of it out of training.
        explore: False takes the likeliest actions; kept out of training as well.
        seed: Of the first reset; environment i gets ``seed + i``.
        token: Bearer token.
        tls: Certificates; None: plaintext.
        insecure: Send the token in plaintext beyond this machine all the same.
        timeouts: How long to wait for what.
        name: For the server's logs.
        update_interval: As this and the next three are for ``PolicyClient``.
        cache_dir: See there.
        spool_dir: See there.
        spool_bytes: See there.
        on_progress: Called about every ``progress_every_s`` with the summary so far.
        progress_every_s: See there.

    Returns:
        What the run has come to.

    Raises:
        InvalidValueError: The environment cannot be run like that.
        gymnasium.error.Error: No such environment.
        PolicyClientError: As ``PolicyClient`` and ``EpisodeBatch.act`` raise.
    """
    if episodes is not None:
        _check_count(episodes, "episodes")
    with (
        _vector_of(env_or_id, num_envs) as envs,
        PolicyClient(
            address,
            inference_mode,
            update_interval,
            token=token,
            tls=tls,
            insecure=insecure,
            timeouts=timeouts,
            name=name,
            # Observations may leave their bounds, so those are no reason to refuse; the shape is
            # checked with the first of them.
            action_space=envs.single_action_space,
            cache_dir=cache_dir,
            spool_dir=spool_dir,
            spool_bytes=spool_bytes,
        ) as client,
        client.episodes(envs.num_envs, training_enabled=training_enabled, explore=explore) as batch,
    ):
        tally = _Tally(envs.num_envs, client)
        observations, _ = envs.reset(seed=seed)
        actions = batch.act(observations)
        next_report = tally.start + progress_every_s
        while True:
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            actions = batch.act(observations, rewards, terminated, truncated)
            tally.add(rewards, terminated | truncated)
            if episodes is not None and tally.episodes >= episodes:
                return tally.summary()
            if on_progress is not None and time.perf_counter() >= next_report:
                on_progress(tally.summary())
                next_report = time.perf_counter() + progress_every_s


class _Tally:
    """Counts episodes, their returns and lengths, in NEXT_STEP order."""

    def __init__(self, n: int, client: PolicyClient) -> None:
        self.start = time.perf_counter()
        self.episodes = 0
        self._client = client
        self._steps = 0
        self._resets = np.zeros(n, np.bool_)  # rows whose step was none but a reset
        self._returns = np.zeros(n)
        self._lengths = np.zeros(n, np.int64)
        self._recent: list[tuple[float, int]] = []

    def add(self, rewards: NDArray[Any], ended: NDArray[np.bool_]) -> None:
        """One vector step."""
        stepped = ~self._resets
        self._returns[stepped] += rewards[stepped]
        self._lengths += stepped
        self._steps += int(stepped.sum())
        if ended.any():
            self.episodes += int(ended.sum())
            self._recent += zip(
                self._returns[ended].tolist(), self._lengths[ended].tolist(), strict=True
            )
            del self._recent[:-RECENT_EPISODES]
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        self._resets = ended

    def summary(self) -> RunSummary:
        """So far."""
        returns, lengths = zip(*self._recent, strict=True) if self._recent else ((), ())
        return RunSummary(
            episodes=self.episodes,
            steps=self._steps,
            seconds=time.perf_counter() - self.start,
            mean_return=float(np.mean(returns)) if returns else float("nan"),
            mean_length=float(np.mean(lengths)) if lengths else float("nan"),
            policy_version=self._client.policy_version,
            stats=dataclasses.replace(self._client.stats),
        )


@contextmanager
def _vector_of(source: EnvSource, num_envs: int) -> Iterator[VectorEnv[Any, Any, Any]]:
    """A vector environment in NEXT_STEP order; closed again if it was made here."""
    if isinstance(source, VectorEnv):
        mode = source.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.NEXT_STEP:
            raise InvalidValueError(
                f"expected a vector environment with autoreset_mode NEXT_STEP, got {mode}: the "
                "final observation of an episode must come before the first of the next one",
                field="env",
            )
        yield source
        return
    _check_count(num_envs, "num_envs")
    if isinstance(source, gym.Env) and num_envs > 1:
        raise InvalidValueError(
            f"one environment cannot be {num_envs}: pass its id, or a function that makes one",
            field="num_envs",
        )
    if isinstance(source, gym.Env):
        given = source
        envs = SyncVectorEnv([lambda: given], autoreset_mode=AutoresetMode.NEXT_STEP)
        try:
            yield envs
        finally:
            envs.closed = True  # else it would close what is the caller's, when it is forgotten
        return
    make = (lambda: gym.make(source)) if isinstance(source, str) else source
    envs = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    try:
        yield envs
    finally:
        envs.close()


def _check_count(value: int, field: str) -> None:
    if not (is_whole(value) and value >= 1):
        raise InvalidValueError(f"expected a whole number of at least 1, got {value!r}", field)
