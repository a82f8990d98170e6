"""Policy servers for tests that need no Ray: the real server under a policy made for testing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.wire.batches import Columns, SpaceCodec
from policy_server.buffer import ExperienceBuffer
from policy_server.config import PolicyServerConfig
from policy_server.experience import Chunk, InferredBatch, RowContext
from policy_server.policy_store import PolicyStore
from policy_server.server import PolicyServer
from policy_server.terms import Terms

CARTPOLE_OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
CARTPOLE_ACTIONS = gym.spaces.Discrete(2)


class CountingPolicy:
    """Acts with the value ``action`` of its space, and remembers what it was asked.

    Attributes:
        asked: Observations of each batch, by leaf.
        greedy: Which rows of each batch were greedy.
    """

    def __init__(self, version: int, action_space: gym.Space[Any], action: Any) -> None:
        self.version = version
        self.asked: list[Columns] = []
        self.greedy: list[NDArray[np.bool_]] = []
        self._action = SpaceCodec(action_space).columns_of(action)

    def infer(
        self, observations: Columns, greedy: NDArray[np.bool_], contexts: Sequence[RowContext]
    ) -> InferredBatch:
        n = len(contexts)
        self.asked.append(observations)
        self.greedy.append(greedy)
        actions = {path: np.repeat(value, n, axis=0) for path, value in self._action.items()}
        outputs = {
            "action_logp": np.full(n, -0.5, np.float32),
            "action_dist_inputs": np.full((n, 2), float(self.version), np.float32),
        }
        return InferredBatch(self, observations, actions, actions, outputs)


class EchoPolicy:
    """Answers each row with what only it can know: its observation, and how often it was asked.

    The action is ``100 * observation[0] + rows of that agent seen before`` (a Discrete space).
    """

    def __init__(self, version: int = 1) -> None:
        self.version = version

    def infer(
        self, observations: Columns, greedy: NDArray[np.bool_], contexts: Sequence[RowContext]
    ) -> InferredBatch:
        counts = np.array([context.memory or 0 for context in contexts], np.int64)
        for context in contexts:
            context.memory = (context.memory or 0) + 1
        actions = {"": observations[""][:, 0].astype(np.int64) * 100 + counts}
        logps = {"action_logp": observations[""][:, 0].astype(np.float32)}
        return InferredBatch(self, observations, actions, actions, logps)


class ServerUnderTest:
    """A listening server, and both of its seams in the test's hands."""

    def __init__(
        self,
        config: PolicyServerConfig,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        capacity_steps: int,
        hold: bool,
        need_logp: bool,
        complete_episodes: bool,
        first_version: int | None,
        **more: Any,
    ) -> None:
        self.config = config
        self.observation_space = observation_space
        self.action_space = action_space
        self.policies = PolicyStore()
        self.buffer = ExperienceBuffer(
            capacity_steps, config.when_full, complete_episodes=complete_episodes
        )
        if first_version is not None:
            self.publish(first_version)
        self.server = PolicyServer(
            config,
            Terms(
                observation_space,
                action_space,
                hold=hold,
                logged_actions_need_logp=need_logp,
                **{"remote_only": "made for tests", **more},
            ),
            policies=self.policies,
            buffer=self.buffer,
        )
        self.address = self.server.start()

    def publish(self, version: int, action: Any = None) -> CountingPolicy:
        """Serve from now on with that version, which acts with ``action``."""
        if action is None:
            action = np.zeros_like(self.action_space.sample())
        policy = CountingPolicy(version, self.action_space, action)
        self.policies.publish(policy)
        return policy

    def collect(self, steps: int = 1, timeout_s: float = 5.0) -> list[Chunk]:
        """What ``sample()`` would take."""
        return self.buffer.collect(steps, timeout_s=timeout_s, idle_timeout_s=timeout_s)

    def asking(self, steps: int) -> Future[list[Chunk]]:
        """``collect`` in a thread; once this returns, the server knows what is wanted."""
        thread = ThreadPoolExecutor(1)
        asked = thread.submit(self.collect, steps)
        thread.shutdown(wait=False)
        # It is done after the time-out of ``collect`` at the latest, also where that fails.
        while not (self.buffer.wanted or asked.done()):
            time.sleep(0.001)
        return asked

    def ledger(self) -> dict[str, int]:
        """Where every step went, with what is held."""
        return {**self.buffer.ledger.snapshot(), "held": self.buffer.held}

    def unaccounted(self) -> int:
        """Steps received that are neither delivered, nor discarded, nor held: 0."""
        ledger = self.ledger()
        received = ledger.pop("received")
        return received - sum(ledger.values())


@contextlib.contextmanager
def serving(
    observation_space: gym.Space[Any] = CARTPOLE_OBSERVATIONS,
    action_space: gym.Space[Any] = CARTPOLE_ACTIONS,
    *,
    capacity_steps: int = 100_000,
    hold: bool = False,
    need_logp: bool = True,
    complete_episodes: bool = False,
    first_version: int | None = 1,
    **settings: Any,
) -> Iterator[ServerUnderTest]:
    """A server on a free port, stopped at the end; ``settings`` go to its configuration."""
    settings = {"port": 0, "drain_s": 0.5, **settings}
    under_test = ServerUnderTest(
        PolicyServerConfig(**settings),
        observation_space,
        action_space,
        capacity_steps=capacity_steps,
        hold=hold,
        need_logp=need_logp,
        complete_episodes=complete_episodes,
        first_version=first_version,
    )
    try:
        yield under_test
    finally:
        under_test.server.stop()
