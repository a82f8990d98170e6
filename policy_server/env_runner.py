"""RLlib's side of the policy server: weights come in, experience goes out. Actor thread only.

RLlib must find no ``async def`` on this class or a base of it: Ray would then run its calls out of
order. The gRPC server has a thread and an event loop of its own.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Collection
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector.utils import batch_space
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SAMPLE_TIMER,
    TIME_BETWEEN_SAMPLING,
    WEIGHTS_SEQ_NO,
)

from policy_server.buffer import ExperienceBuffer
from policy_server.callbacks import Callbacks
from policy_server.config import PolicyServerConfig
from policy_server.env_spaces import spaces_of
from policy_server.episode_metrics import EpisodeMetrics
from policy_server.filters import MeanStdFilter
from policy_server.handover import HandOver
from policy_server.inference import build_factory
from policy_server.learner_view import LearnerViews, use_exact_filters
from policy_server.onnx_engine.factory import OnnxFactory
from policy_server.policy_store import PolicyStore
from policy_server.relay import NO_WEIGHTS, DriverPipeline, report, weights_in
from policy_server.semantics import resolve
from policy_server.server import PolicyServer
from policy_server.server_metrics import ServerMetrics
from policy_server.terms import Terms
from policy_server.weights import Versions, bring, not_finite, weights_of

_logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.09
"""With no simulator connected ``sample()`` returns within 0.1 s: other runners may have some."""
_SAY_IDLE_EVERY_S = 10.0


def dedicate_process() -> None:
    """Set this process up for serving actions. All of it is the process's: no learner beside us."""
    # With more threads the tail of inference times is tens of milliseconds long.
    torch.set_num_threads(1)
    # What Ray and torch leave behind is here to stay: no collection need look at it, which would
    # stop all actions meanwhile. And rows make thousands of short-lived containers a second, none
    # of them in cycles: to look for those every 700 is in vain.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class PolicyServerEnvRunner(EnvRunner, Checkpointable):
    """An env runner without envs: simulators connect to it, act by its policy, and report rewards.

    Name it in the config and RLlib does the rest::

        config.env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)

    The server listens in each remote runner, or in the local one if there are no others.

    Attributes:
        address: HOST:PORT of the server; empty where none is.
        engine: Which engine chooses the actions, and why that one; empty where none does.
    """

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        """Build spaces, connectors, module; start listening.

        Args:
            config: Of the algorithm. ``env_config`` holds a ``PolicyServerConfig``.
            kwargs: RLlib's: ``worker_index``, ``num_workers``, ``spaces``, ``tune_trial_id``.

        Raises:
            ValueError: A setting makes no sense with this algorithm; it is named.
            ServerStartError: The port is in use.
        """
        super().__init__(config=config, **kwargs)
        self.worker_index: int = kwargs.get("worker_index") or 0
        self.tune_trial_id = kwargs.get("tune_trial_id")
        if self.config.in_evaluation:
            raise ValueError(
                "evaluation env runners cannot be policy servers: simulators would have to know "
                "when to connect to them. Let simulators start episodes with explore=False or "
                "training_enabled=False instead (reported under env_runners/evaluation), or give "
                "evaluation_config an env_runner_cls of its own."
            )
        if self.worker_index > 0:
            dedicate_process()

        env_config = dict(self.config.env_config)
        self._server_config = PolicyServerConfig.from_env_config(env_config)
        _check_port(self.config.num_env_runners, self._server_config.port)
        self._observation_space, self._action_space = spaces_of(self.config, kwargs.get("spaces"))
        self._semantics = resolve(self.config, self._server_config, self.worker_index)

        self._env_to_module = self._build_env_to_module()
        self.spaces = self.get_spaces()
        self.make_module()
        self._module_to_env = self.config.build_module_to_env_connector(spaces=self.spaces)
        if self.worker_index == 0 and self.config.num_env_runners > 0:
            self._env_to_module = DriverPipeline(
                self._env_to_module,
                seq_no=lambda: self._weights_seq_no,
                weights=self.module.get_state,
            )

        self._callbacks = Callbacks(self.config, env_runner=self, metrics_logger=self.metrics)
        self._episode_metrics = EpisodeMetrics(self)
        self._server_metrics = ServerMetrics(self.metrics)
        self._env_runner_state_server: Any = None  # set by IMPALA
        self._weights_seq_no = 0
        self._refused_seq_no = 0  # of weights newer than these that were not finite
        self._steps_since_weights = 0
        self._steps_since_count = 0
        self._time_after_sampling: float | None = None
        self._said_idle_s = -math.inf
        self._anything_to_report = False
        self._versions = Versions()
        self._policies = PolicyStore()
        self._server: PolicyServer | None = None
        self._stopped = False
        self.address = ""
        self.engine = ""
        if self.worker_index > 0 or self.config.num_env_runners == 0:
            self._serve()
            if not self.config.explore:
                _logger.warning(
                    "explore=False of the config has no effect: simulators decide for each episode"
                )

    def _serve(self) -> None:
        semantics, server_config = self._semantics, self._server_config
        self._views = LearnerViews(
            self._env_to_module, self._observation_space, self._build_env_to_module
        )
        self._factory = build_factory(
            self.config,
            self.module,
            self._observation_space,
            self._action_space,
            self._env_to_module,
            self._module_to_env,
            worker_index=self.worker_index,
        )
        self.engine = f"the {self._factory.name} engine: {self._factory.reason}"
        # The slower one is rarely what somebody has chosen.
        fast = isinstance(self._factory, OnnxFactory)
        _logger.log(logging.INFO if fast else logging.WARNING, "acting by %s", self.engine)
        self._buffer = ExperienceBuffer(
            semantics.capacity_steps,
            server_config.when_full,
            complete_episodes=semantics.complete_episodes,
        )
        lookback = int(self.config.episode_lookback_horizon)
        self._handover = HandOver(
            views=self._views,
            action_space=self._action_space,
            ledger=self._buffer.ledger,
            callbacks=self._callbacks,
            rl_module=self.module,
            # A recurrent module's state at the start of a chunk is the output of the step before.
            lookback=max(1, lookback) if self.module.is_stateful() else lookback,
            max_policy_lag=semantics.max_policy_lag,
            joins_chunks=semantics.joins_chunks,
        )
        self._server = PolicyServer(
            server_config,
            Terms(
                self._observation_space,
                self._action_space,
                hold=semantics.hold,
                logged_actions_need_logp=semantics.logged_actions_need_logp,
                normalize_actions=bool(self.config.normalize_actions),
                remote_only=None if fast else self._factory.reason,
                steps_per_upload=semantics.steps_per_upload,
            ),
            policies=self._policies,
            buffer=self._buffer,
        )
        self.address = self._server.start()

    # Experience goes out.

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        """Wait for experience, a few seconds at most, and hand it over.

        Args:
            num_timesteps: Steps to aim at; None: a fragment, less what was handed over since the
                last weights, so that a train batch is exceeded by one fragment at most.
            num_episodes: Refused; simulators decide when an episode ends.
            explore: None, or what the config says; simulators decide for each episode.
            random_actions: Refused.
            force_reset: Refused.

        Returns:
            Episodes and chunks of episodes. An empty list if nobody was connected, or nothing was
            learnt from within ``sample_wait_s``.

        Raises:
            ValueError: An argument asks for what only an env loop can do.
        """
        if self._stopped:
            return []
        if self._server is None:
            raise ValueError(
                f"{self} serves nobody: with num_env_runners={self.config.num_env_runners} "
                "experience comes from the remote env runners"
            )
        _refuse_env_loop_arguments(
            num_episodes=num_episodes,
            explore=None if explore == self.config.explore else explore,
            random_actions=random_actions or None,
            force_reset=force_reset or None,
        )
        now = time.perf_counter()
        if self._time_after_sampling is not None:
            self.metrics.log_value(TIME_BETWEEN_SAMPLING, now - self._time_after_sampling)
        self._pull_state()
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        with self.metrics.log_time(SAMPLE_TIMER):
            episodes = self._sample(num_timesteps)
            if self._callbacks.wants("on_sample_end"):
                self._callbacks.call("on_sample_end", samples=episodes)
        self._time_after_sampling = time.perf_counter()
        return episodes

    def _sample(self, num_timesteps: int | None) -> list[SingleAgentEpisode]:
        fragment = self._semantics.fragment_steps
        if self._steps_since_weights >= fragment:
            # Asked again under the same weights: it learns from several fragments at once, has
            # not begun to learn, or the weights were lost on the way.
            self._steps_since_weights = 0
        target = num_timesteps or fragment - self._steps_since_weights
        deadline = time.monotonic() + self._server_config.sample_wait_s
        episodes: list[SingleAgentEpisode] = []
        steps = ended = 0
        anything = False
        while steps < target:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            chunks = self._buffer.collect(
                target - steps, timeout_s=left_s, idle_timeout_s=_IDLE_WAIT_S
            )
            policy = self._policies.current
            handed = self._handover.take(chunks, 0 if policy is None else policy.version)
            episodes += handed.episodes
            steps += handed.steps
            ended += sum(end.reported for end in handed.ends)
            anything |= bool(handed.steps or handed.ends or handed.evaluation_ends)
            self._episode_metrics.log(handed.ends, handed.evaluation_ends)
            if not chunks:
                break
        self._steps_since_weights += steps
        self._steps_since_count += steps
        self._anything_to_report |= anything
        if steps:
            self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        elif self._server is not None and not self._server.sessions:
            self._say_idle()
        SingleAgentEnvRunner._increase_sampled_metrics(self, steps, ended)
        return episodes

    def _say_idle(self) -> None:
        now = time.monotonic()
        if now - self._said_idle_s >= _SAY_IDLE_EVERY_S:
            self._said_idle_s = now
            _logger.warning("no simulator connected at %s; waiting for one", self.address)

    def get_metrics(self) -> dict[str, Any]:
        """What was logged since the last call, with the server's own numbers.

        Nothing at all after a ``sample()`` that brought nothing: RLlib keeps the metrics of each
        such call until its batch is full, which may take a night without simulators.
        """
        if self._server is not None:
            if not self._anything_to_report and self.config.count_steps_by == "env_steps":
                return {}
            self._anything_to_report = False
            policy = self._policies.current
            self._server_metrics.log(
                self._server,
                -1 if policy is None else policy.version,
                {
                    "callback_errors": self._callbacks.errors,
                    "handover_errors": self._handover.errors,
                },
            )
        metrics: dict[str, Any] = self.metrics.reduce()
        return metrics

    # Weights come in.

    def get_spaces(self) -> dict[str, tuple[gym.Space[Any], gym.Space[Any]]]:
        """See ``EnvRunner``."""
        n = self.config.num_envs_per_env_runner
        spaces = (self._observation_space, self._action_space)
        return {
            INPUT_ENV_SPACES: (batch_space(spaces[0], n), batch_space(spaces[1], n)),
            INPUT_ENV_SINGLE_SPACES: spaces,
            DEFAULT_MODULE_ID: (self._env_to_module.observation_space, spaces[1]),
        }

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See ``Checkpointable``; the same as RLlib's own env runner."""
        if self._check_component(COMPONENT_ENV_TO_MODULE_CONNECTOR, components, not_components):
            for connector in self._env_to_module.connectors:
                if isinstance(connector, MeanStdFilter):
                    connector.close_segment()
        state: dict[str, Any] = SingleAgentEnvRunner.get_state(
            self, components, not_components=not_components, **kwargs
        )
        remote = self.worker_index > 0 and self.config.create_local_env_runner
        if remote and COMPONENT_ENV_TO_MODULE_CONNECTOR in state:
            missing = self._policies.current is None
            report(
                state[COMPONENT_ENV_TO_MODULE_CONNECTOR],
                # Refused ones as well: sent again, they would be refused again.
                NO_WEIGHTS if missing else max(self._weights_seq_no, self._refused_seq_no),
            )
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take connector state and counters, and publish a policy if weights came along.

        RLlib's number of the weights is followed, except that the version of a policy never goes
        back: a lower number means that a checkpoint was restored, and its weights become the next
        version. Number 0, or none, is always published, unless it is a checkpoint's weights that
        are to be the first; the number served already is no news.

        Args:
            state: What ``get_state`` gives, or parts of it; the weights may be an object ref.
        """
        missed = None
        if COMPONENT_ENV_TO_MODULE_CONNECTOR in state:
            self._env_to_module.set_state(state[COMPONENT_ENV_TO_MODULE_CONNECTOR])
            missed = weights_in(state[COMPONENT_ENV_TO_MODULE_CONNECTOR])
        if COMPONENT_MODULE_TO_ENV_CONNECTOR in state:
            self._module_to_env.set_state(state[COMPONENT_MODULE_TO_ENV_CONNECTOR])
        # Before the weights: exploration schedules of the new policy depend on it.
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in state:
            self.num_env_steps_sampled_lifetime = state[NUM_ENV_STEPS_SAMPLED_LIFETIME]
            self._steps_since_count = 0
        if COMPONENT_RL_MODULE in state:
            self._set_weights(state[COMPONENT_RL_MODULE], state.get(WEIGHTS_SEQ_NO, 0))
        seen = max(self._weights_seq_no, self._refused_seq_no)
        if missed is not None and missed[WEIGHTS_SEQ_NO] > seen:
            _logger.info(
                "weights %d were lost on their way and are here now", missed[WEIGHTS_SEQ_NO]
            )
            self._set_weights(missed[COMPONENT_RL_MODULE], missed[WEIGHTS_SEQ_NO])

    def _set_weights(self, weights: Any, seq_no: int) -> None:
        if seq_no and seq_no == self._weights_seq_no:
            return
        weights = weights_of(weights, seq_no)
        if weights is None:
            return
        if broken := not_finite(weights):
            if not seq_no or seq_no != self._refused_seq_no:
                self._refuse(seq_no, broken)
            return
        self.module.set_state(weights)
        self._refused_seq_no = 0
        if seq_no:
            self._weights_seq_no = seq_no
        awaited = self._server_config.awaits_checkpoint and self._policies.current is None
        if self._server is not None and not (awaited and seq_no == 0):
            self._publish(self._server, seq_no)

    def checkpoint_restored(self) -> None:
        """Serve the weights there are, whatever their number: what ``awaits_checkpoint`` awaits.

        A checkpoint from before the learner's first update has number 0, too.
        """
        if self._server is not None and self._policies.current is None:
            self._publish(self._server, self._weights_seq_no)

    def _refuse(self, seq_no: int, broken: str) -> None:
        self._refused_seq_no = seq_no
        message = f"weights {seq_no} are not finite ({broken}): the last good ones are kept"
        _logger.error("%s", message)
        if self._server is not None:
            self._server.set_degraded(message)

    def _publish(self, server: PolicyServer, seq_no: int) -> None:
        current = self._policies.current
        version = self._versions.after(None if current is None else current.version, seq_no)
        env_steps = self.num_env_steps_sampled_lifetime + self._steps_since_count * max(
            1, self.config.num_env_runners
        )
        view = self._views.freeze(self._weights_seq_no)
        self._policies.publish(self._factory.build(version, env_steps, view))
        self._steps_since_weights = 0
        server.set_degraded(None)

    def _pull_state(self) -> None:
        """Where IMPALA's runners fetch their weights instead of being sent them."""
        if self._env_runner_state_server is None:
            return
        state = bring(
            self._env_runner_state_server.pull_if_newer.remote(self._weights_seq_no),
            "no weights from the state server",
        )
        if state is not None:
            self.set_state(state)

    # What RLlib calls besides.

    def make_env(self) -> None:
        """Nothing to make: simulators bring their own."""

    def make_module(self) -> None:
        """Build the module from the config; its weights come later."""
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        self.module: Any = spec.build()

    def assert_healthy(self) -> None:
        """See ``EnvRunner``.

        Raises:
            RuntimeError: The constructor did not finish.
        """
        if getattr(self, "module", None) is None:
            raise RuntimeError(f"{self} has no module: it was not constructed properly")

    def stop(self) -> None:
        """End the server, within a few seconds; whoever waits for it gets an error."""
        self._stopped = True
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See ``Checkpointable``."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """See ``Checkpointable``."""
        return [
            (COMPONENT_RL_MODULE, self.module),
            (COMPONENT_ENV_TO_MODULE_CONNECTOR, self._env_to_module),
            (COMPONENT_MODULE_TO_ENV_CONNECTOR, self._module_to_env),
        ]

    def _build_env_to_module(self) -> Any:
        spaces = {INPUT_ENV_SINGLE_SPACES: (self._observation_space, self._action_space)}
        return use_exact_filters(
            self.config.build_env_to_module_connector(spaces=spaces),
            reports=self.worker_index > 0,
        )


def _check_port(runners: int, port: int) -> None:
    if runners > 1 and port != 0:
        raise ValueError(
            f"num_env_runners={runners} with port={port}: each env runner is a server of its own, "
            "and only one can listen there. Use num_env_runners=1; or port=0, and tell each "
            "simulator the address of one of them."
        )


def _refuse_env_loop_arguments(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"sample({name}={value!r}): episodes belong to the simulators that connect here, "
                "so they cannot be reset, counted or acted in from this side"
            )
