"""Chunks and runners made by hand, for tests of RLlib's side."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.ppo import PPOConfig

from client_sdk import PolicyClient
from client_sdk.config import Timeouts
from client_sdk.errors import PolicyClientError
from client_sdk.wire.batches import SpaceCodec
from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from policy_server.callbacks import Callbacks
from policy_server.experience import Chunk, EpisodeEnd, EpisodeIdentity, InferredBatch
from policy_server.handover import HandOver
from policy_server.learner_view import LearnerView, LearnerViews, use_exact_filters
from policy_server.ledger import Ledger

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = gym.spaces.Discrete(3)


class ViewedPolicy:
    """A policy that only its version and its view are asked for."""

    def __init__(self, version: int, view: LearnerView) -> None:
        self.version = version
        self.view = view


def ppo_config(server: dict[str, Any] | None = None, **env_runners: Any) -> PPOConfig:
    """PPO over the small spaces of these tests."""
    settings = {"port": 0, "sample_wait_s": 1.0, "drain_s": 0.2, **(server or {})}
    return (
        PPOConfig()
        .environment(
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            env_config=PolicyServerConfig(**settings).to_env_config(),
        )
        .env_runners(
            env_runner_cls=PolicyServerEnvRunner,
            **{"num_env_runners": 0, "rollout_fragment_length": 20, **env_runners},
        )
        .training(train_batch_size=20, minibatch_size=20)
        .rl_module(model_config={"fcnet_hiddens": [8]})
    )


class Lane:
    """Makes the chunks of one episode, with observations that tell their own step."""

    def __init__(self, observation_space: gym.Space[Any] = OBSERVATIONS, offset: float = 0) -> None:
        self.identity = EpisodeIdentity()
        self.step = 0
        self.offset = offset
        self._codec = SpaceCodec(observation_space)

    def observation(self, step: int) -> Any:
        """What is observed at that step."""
        return np.array([step + self.offset, -(step + self.offset)], np.float32)

    def chunk(
        self,
        policy: Any,
        steps: int,
        *,
        terminated: bool = False,
        truncated: bool = False,
        logged: Sequence[int] = (),
        policies: Sequence[Any] | None = None,
        **more: Any,
    ) -> Chunk:
        """The next steps of the episode; ``policies`` names each step's own, if they differ."""
        rows: list[tuple[InferredBatch, int]] = []
        for i in range(steps):
            step = self.step + i
            others = [self.observation(step + 1000) for _ in range(i % 2)]
            observations = self._codec.columns_of_batch(
                [*others, self.observation(step)], 1 + len(others)
            )
            n = 1 + len(others)
            actions = {"": np.full(n, step % 3, np.int64)}
            outputs = {
                "action_logp": np.full(n, -0.1 * step, np.float32),
                "action_dist_inputs": np.full((n, 3), float(step), np.float32),
                "state_out/actor/h": np.full((n, 4), float(step), np.float32),
            }
            by = policies[i] if policies is not None else policy
            rows.append((InferredBatch(by, observations, actions, actions, outputs), n - 1))
        first_step, self.step = self.step, self.step + steps
        done = terminated or truncated
        chunk = Chunk(
            self.identity,
            "",
            policies[0] if policies is not None else policy,
            rows,
            [float(first_step + i) for i in range(steps)],
            self._codec.columns_of(self.observation(self.step)),
            first_step=first_step,
            terminated=terminated,
            truncated=truncated,
            logged=list(logged),
            end=EpisodeEnd(1.0, self.step, 0.5, {}) if done else None,
        )
        for name, value in more.items():
            setattr(chunk, name, value)
        return chunk


class HandOverUnderTest:
    """A hand-over with everything around it."""

    def __init__(self, config: PPOConfig | None = None, **settings: Any) -> None:
        self.config = config or ppo_config()
        space = self.config.observation_space

        def build_pipeline() -> Any:
            return self.config.build_env_to_module_connector()

        self.pipeline = use_exact_filters(build_pipeline(), reports=False)
        self.views = LearnerViews(self.pipeline, space, build_pipeline)
        self.ledger = Ledger()
        self.callbacks = Callbacks(self.config, env_runner=None, metrics_logger=None)
        defaults: dict[str, Any] = {"lookback": 1, "max_policy_lag": 1, "joins_chunks": False}
        self.handover = HandOver(
            views=self.views,
            action_space=self.config.action_space,
            ledger=self.ledger,
            callbacks=self.callbacks,
            rl_module=None,
            **(defaults | settings),
        )

    def policy(self, version: int = 0) -> ViewedPolicy:
        """A version with the statistics of now."""
        return ViewedPolicy(version, self.views.freeze(version))

    def take(self, *chunks: Chunk, version: int = 0) -> Any:
        """Hand over what the buffer would have given."""
        return self.handover.take(chunks, version)


@contextlib.contextmanager
def running(config: PPOConfig) -> Iterator[PolicyServerEnvRunner]:
    """A runner in this process, with the weights that a learner would send first."""
    runner = PolicyServerEnvRunner(config=config, worker_index=0, num_workers=0)
    try:
        runner.set_state({"rl_module": runner.module.get_state(), "weights_seq_no": 0})
        yield runner
    finally:
        runner.stop()


class Simulator:
    """Steps episodes of fixed length against a server, in a thread, until told to stop.

    Attributes:
        failure: What ended the thread, if something did.
    """

    def __init__(
        self,
        address: str,
        *,
        length: int = 5,
        rows: int = 0,
        space: Any = OBSERVATIONS,
        inference_mode: str = "remote",
        **options: Any,
    ) -> None:
        """Start.

        Args:
            address: Of the server.
            length: Of each episode; every other one is truncated instead of terminated.
            rows: Episodes that step together; 0 for single ones.
            space: Of observations, which are samples of it.
            inference_mode: Where actions are chosen.
            options: Of each episode.
        """
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._client = PolicyClient(
            address, inference_mode, update_interval=0.1, timeouts=Timeouts(connect_s=5.0)
        )
        self._length, self._rows, self._options, self._space = length, rows, options, space
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._rows:
                self._step_together()
            else:
                while not self._stop.is_set():
                    self._run_episode()
        except Exception as error:
            if not self._stop.is_set():  # else closed under its feet, perhaps while held
                self.failure = error

    def _run_episode(self) -> None:
        with self._client.episode(**self._options) as episode:
            for step in range(self._length):
                episode.act(self._space.sample(), float(step > 0))
                if self._stop.is_set():
                    return
            episode.log_returns(0.0, {"goals": 3})
            episode.end(self._space.sample(), 1.0, terminated=True)

    def _step_together(self) -> None:
        n = self._rows
        step = 0
        with self._client.episodes(n, **self._options) as batch:
            while not self._stop.is_set():
                done = step == self._length
                observations = np.stack([self._space.sample() for _ in range(n)])
                ends = np.full(n, done)
                batch.act(observations, np.full(n, float(step > 0)), ends, ~ends & False)
                step = 0 if done else step + 1

    def stop(self) -> None:
        """End the episodes and the session."""
        self._stop.set()
        with contextlib.suppress(PolicyClientError):
            self._client.close()
        self._thread.join(10)


@contextlib.contextmanager
def simulating(address: str, **options: Any) -> Iterator[Simulator]:
    """A simulator that must not have failed at the end."""
    simulator = Simulator(address, **options)
    try:
        yield simulator
    finally:
        simulator.stop()
    if simulator.failure is not None:
        raise simulator.failure
