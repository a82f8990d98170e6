"""The RLModule engine serves what RLlib would have served, agent by agent."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from modules import CARTPOLE, Built, build, contexts, flags
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import (
    FlattenObservations,
    MeanStdFilter,
    PrevActionsPrevRewards,
)
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from client_sdk.wire.batches import SpaceCodec
from policy_server.experience import InferredBatch, RowContext
from policy_server.onnx_engine.check import module_inputs, probe


class OwnDQN(DefaultDQNTorchRLModule):
    """Has no graph, because a user made it."""


class OwnSAC(DefaultSACTorchRLModule):
    """Likewise."""


BOX = gym.spaces.Box(-2.0, 2.0, (3,))


def lstm(*connectors: Any) -> Built:
    model = DefaultModelConfig(
        use_lstm=True, lstm_cell_size=6, max_seq_len=4, fcnet_hiddens=[8], vf_share_layers=True
    )
    return build(PPOConfig().rl_module(model_config=model), CARTPOLE, None, *connectors)


def policy_of(built: Built, env_steps: int = 0) -> Any:
    factory = built.factory()
    assert factory.name == "rl_module"
    return factory.build(1, env_steps, cast("Any", None))


def step(policy: Any, observations: Any, agents: list[RowContext], *, greedy: bool = True) -> Any:
    n = len(agents)
    return policy.infer({"": observations}, flags(n, greedy=greedy), agents)


def test_recurrent_state_stays_with_its_agent_in_whatever_batch_it_travels() -> None:
    policy = policy_of(lstm())
    rng = np.random.default_rng(0)
    agents, length = 4, 20
    seen = rng.standard_normal((agents, length, 4)).astype(np.float32)
    alone = np.empty((agents, length, 2), np.float32)
    for agent in range(agents):
        (context,) = contexts(1)
        for t in range(length):
            batch = step(policy, seen[agent, t : t + 1], [context])
            alone[agent, t] = batch.outputs["action_dist_inputs"][0]

    together = np.full_like(alone, np.nan)
    memories, at = contexts(agents), np.zeros(agents, np.int64)
    while (at < length).any():
        chosen = rng.permutation([a for a in range(agents) if at[a] < length])[
            : rng.integers(1, agents + 1)
        ]
        batch = step(policy, seen[chosen, at[chosen]], [memories[a] for a in chosen])
        together[chosen, at[chosen]] = batch.outputs["action_dist_inputs"]
        at[chosen] += 1
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_recurrent_state_is_what_the_module_gives_step_by_step() -> None:
    built = lstm()
    policy = policy_of(built)
    rng = np.random.default_rng(0)
    (context,) = contexts(1)
    state = {name: value[None] for name, value in built.module.get_initial_state().items()}
    for _ in range(40):
        observation = rng.standard_normal((1, 4)).astype(np.float32)
        batch = step(policy, observation, [context])
        with torch.no_grad():
            wanted = built.module.forward_inference(
                {"obs": torch.from_numpy(observation[:, None]), "state_in": state}
            )
        state = wanted["state_out"]
        np.testing.assert_allclose(
            batch.outputs["action_dist_inputs"], wanted["action_dist_inputs"][:, 0], atol=1e-5
        )
        np.testing.assert_allclose(batch.outputs["state_out/h"], state["h"], atol=1e-5)
        np.testing.assert_allclose(batch.outputs["state_out/c"], state["c"], atol=1e-5)


def test_a_shadow_episode_stays_short() -> None:
    policy = policy_of(lstm())
    (context,) = contexts(1)
    rng = np.random.default_rng(0)
    longest = 0
    for _ in range(80):
        step(policy, rng.standard_normal((1, 4)).astype(np.float32), [context], greedy=False)
        episode = context.memory.episode
        longest = max(longest, len(episode.observations.data))
    assert episode.t == 79
    assert longest < 25


def test_connectors_see_the_previous_action_and_its_reward() -> None:
    built = build(PPOConfig(), CARTPOLE, None, PrevActionsPrevRewards, FlattenObservations)
    policy = policy_of(built)
    seen: list[Any] = []
    forward = policy._module.forward_inference
    policy._module.forward_inference = lambda batch: seen.append(batch["obs"]) or forward(batch)
    (context,) = contexts(1)
    actions = []
    for t in range(40):
        context.reward = t / 10
        batch = step(policy, np.full((1, 4), t, np.float32), [context])
        actions.append(int(batch.actions[""][0]))
    for t in range(1, 40):
        # RLlib flattens in the order of the keys: observation, one-hot action, reward.
        observation, action, reward = seen[t][0].split([4, 2, 1])
        assert observation.tolist() == [t] * 4
        assert action.argmax() == actions[t - 1]
        assert reward == pytest.approx(t / 10)


def test_greedy_and_exploring_rows_share_a_batch() -> None:
    policy = policy_of(lstm())
    observations = np.tile(np.random.default_rng(0).standard_normal(4), (400, 1))
    greedy = np.arange(400) % 4 == 0
    batch = policy.infer({"": observations.astype(np.float32)}, greedy, contexts(400))
    likeliest = batch.outputs["action_dist_inputs"][0].argmax()
    assert (batch.actions[""][greedy] == likeliest).all()
    assert 0 < (batch.actions[""][~greedy] != likeliest).mean() < 0.6
    assert batch.outputs["action_logp"].shape == (400,)
    assert (batch.outputs["action_logp"][~greedy] < 0).all()


def test_a_version_keeps_the_weights_and_statistics_that_it_was_built_with() -> None:
    built = lstm(MeanStdFilter)
    codec = SpaceCodec(CARTPOLE)
    rows = probe(codec, 20, np.random.default_rng(0))
    module_inputs(built.module, built.env_to_module, codec, rows, 20)
    policy = policy_of(built)
    statistics = str(built.env_to_module.get_state())

    def ask() -> Any:
        return step(policy, rows[""], contexts(20)).outputs["action_dist_inputs"]

    before = ask()
    assert str(built.env_to_module.get_state()) == statistics
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.zero_()
    more = {"": rows[""] * 5 + 1}
    module_inputs(built.module, built.env_to_module, codec, more, 20)
    assert np.array_equal(ask(), before)
    assert not np.array_equal(
        step(policy_of(built), rows[""], contexts(20)).outputs["action_dist_inputs"], before
    )


class FailsOnce(ConnectorV2):
    """Raises at one call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = 0
        self.fails_at = -1

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("a bug in a connector")
        return batch


def test_asking_again_after_a_failed_inference_takes_one_step() -> None:
    built = lstm(FailsOnce)
    rows = np.random.default_rng(0).standard_normal((6, 1, 4)).astype(np.float32)

    def run(fails_at: int) -> list[Any]:
        policy = policy_of(built)
        policy._env_to_module.connectors[0].fails_at = fails_at
        (context,) = contexts(1)
        found = []
        for row in rows:
            try:
                batch = step(policy, row, [context])
            except RuntimeError:
                batch = step(policy, row, [context])
            found.append(batch.outputs["action_dist_inputs"])
        assert context.memory.episode.t == 5
        return found

    for failed, smooth in zip(run(3), run(-1), strict=True):
        assert np.array_equal(failed, smooth)


def test_an_episode_goes_on_under_a_newer_version() -> None:
    built = lstm()
    factory = built.factory()
    rows = np.random.default_rng(0).standard_normal((10, 1, 4)).astype(np.float32)
    (alone,), (mixed,) = contexts(1), contexts(1)
    one = factory.build(1, 0, cast("Any", None))
    wanted = [step(one, row, [alone]).outputs["action_dist_inputs"] for row in rows]
    found = [
        step(factory.build(t, 0, cast("Any", None)), row, [mixed]).outputs["action_dist_inputs"]
        for t, row in enumerate(rows)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_dict_actions_come_leaf_by_leaf_from_the_spaces_start() -> None:
    space = gym.spaces.Dict(
        {
            "gear": gym.spaces.Discrete(3, start=2),
            "two": gym.spaces.Tuple((BOX, gym.spaces.MultiDiscrete([2, 3], start=[1, 0]))),
        }
    )
    policy = policy_of(build(PPOConfig(), CARTPOLE, space))
    codec = SpaceCodec(space)
    rows = probe(SpaceCodec(CARTPOLE), 30, np.random.default_rng(0))
    batch = policy.infer(rows, np.arange(30) % 2 == 0, contexts(30))
    assert set(batch.actions) == set(batch.env_actions) == set(codec.paths)
    assert np.array_equal(batch.actions["gear"] + 2, batch.env_actions["gear"])
    assert batch.outputs["action_logp"].shape == (30,)
    for row in range(30):
        assert space.contains(codec.value(batch.env_actions, row))


def test_q_learning_over_atoms_explores_by_the_schedule() -> None:
    config = DQNConfig().training(num_atoms=5, epsilon=[(0, 1.0), (100, 0.0)])
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=OwnDQN))
    built = build(config, CARTPOLE, gym.spaces.Discrete(4))
    rows = np.tile(probe(SpaceCodec(CARTPOLE), 1, np.random.default_rng(0))[""], (200, 1))
    late = step(policy_of(built, 100), rows, contexts(200), greedy=False)
    early = step(policy_of(built, 0), rows, contexts(200), greedy=False)
    assert late.outputs == {}
    assert len(np.unique(late.actions[""])) == 1
    assert len(np.unique(early.actions[""])) == 4


def test_sac_acts_within_the_bounds() -> None:
    config = SACConfig().rl_module(rl_module_spec=RLModuleSpec(module_class=OwnSAC))
    built = build(config, CARTPOLE, BOX)
    rows = probe(SpaceCodec(CARTPOLE), 50, np.random.default_rng(0))
    batch = step(policy_of(built), rows[""], contexts(50), greedy=False)
    assert batch.outputs["action_logp"].shape == (50,)
    assert (np.abs(batch.actions[""]) <= 1).all()
    assert BOX.contains(batch.env_actions[""][0])


def test_a_logged_action_is_what_the_next_inference_remembers() -> None:
    policy = policy_of(lstm())
    observations = np.zeros((1, 4), np.float32)
    (context,) = contexts(1)
    batch = step(policy, observations, [context])
    other = {"": 1 - batch.actions[""]}
    context.logged = (InferredBatch(policy, batch.observations, other, other, batch.outputs), 0)
    step(policy, observations, [context])
    assert context.memory.episode.get_actions(-1) == other[""][0]
    assert context.logged is None
