"""``build_factory`` takes the ONNX engine where it can, and says why where it cannot."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from kinds import random_kind
from modules import CARTPOLE, Built, build, contexts, flags
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations, PrevActionsPrevRewards
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from client_sdk.wire.batches import SpaceCodec
from policy_server.inference import UnservableError
from policy_server.onnx_engine import factory as onnx_factory
from policy_server.onnx_engine.check import probe

BOX = gym.spaces.Box(-2.0, 2.0, (3,))


class OwnModule(DefaultPPOTorchRLModule):
    """Stands for whatever a user overrides."""


class OwnSAC(DefaultSACTorchRLModule):
    """Likewise."""


class OwnDQN(DefaultDQNTorchRLModule):
    """Likewise."""


class OwnConnector(ConnectorV2):
    """Stands for whatever a user does to observations."""

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return batch


def lstm() -> Any:
    model = DefaultModelConfig(use_lstm=True, lstm_cell_size=8, max_seq_len=4)
    return PPOConfig().rl_module(model_config=model)


def own_module() -> Any:
    return PPOConfig().rl_module(rl_module_spec=RLModuleSpec(module_class=OwnModule))


def own_actions() -> Any:
    return PPOConfig().env_runners(module_to_env_connector=lambda env, spaces: [OwnConnector()])


REFUSED = {
    "recurrent": lambda: build(lstm()),
    "OwnModule": lambda: build(own_module()),
    "env-to-module connector OwnConnector": lambda: build(
        PPOConfig(), CARTPOLE, None, OwnConnector
    ),
    "module-to-env connector OwnConnector": lambda: build(own_actions()),
    "PrevActionsPrevRewards": lambda: build(
        PPOConfig(), CARTPOLE, None, PrevActionsPrevRewards, FlattenObservations
    ),
    "OwnSAC": lambda: build(
        SACConfig().rl_module(rl_module_spec=RLModuleSpec(module_class=OwnSAC)), CARTPOLE, BOX
    ),
    "OwnDQN": lambda: build(
        DQNConfig().rl_module(rl_module_spec=RLModuleSpec(module_class=OwnDQN)),
    ),
    "Dict actions of TorchMultiDistribution": lambda: build(
        PPOConfig(),
        CARTPOLE,
        gym.spaces.Dict({"gear": gym.spaces.Discrete(3, start=2), "wheel": BOX}),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_graph_is_served_by_the_module_with_the_reason(reason: str) -> None:
    built: Built = REFUSED[reason]()
    factory = built.factory()
    assert factory.name == "rl_module"
    assert reason in factory.reason
    assert "\n" not in factory.reason
    policy = factory.build(1, 0, cast("Any", None))
    observations = probe(SpaceCodec(built.observation_space), 3, np.random.default_rng(0))
    greedy = np.array([False, True, False])
    batch = policy.infer(observations, greedy, contexts(3))
    leaves = SpaceCodec(built.action_space)
    for path in leaves.paths:
        assert batch.env_actions[path].dtype == leaves.leaf(path).dtype
        assert batch.env_actions[path].shape == (3, *leaves.leaf(path).shape)
    for row in range(3):
        assert built.action_space.contains(leaves.value(batch.env_actions, row))


def test_a_default_module_is_served_by_its_graph() -> None:
    factory = build(PPOConfig()).factory()
    assert factory.name == "onnx"
    assert "DefaultPPOTorchRLModule" in factory.reason


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_spaces_a_default_module_has_a_graph_that_passes_its_check(seed: int) -> None:
    factory = random_kind(seed).factory()
    assert factory.name == "onnx", factory.reason


def test_a_graph_that_differs_from_rllib_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(PPOConfig())
    forward = DefaultPPOTorchRLModule._forward

    def other(self: Any, batch: Any, **kwargs: Any) -> Any:
        outputs = forward(self, batch, **kwargs)
        outputs["action_dist_inputs"] = outputs["action_dist_inputs"] + 0.01
        return outputs

    monkeypatch.setattr(DefaultPPOTorchRLModule, "_forward", other)
    factory = built.factory()
    assert factory.name == "rl_module"
    assert "action_dist_inputs differs" in factory.reason


def test_an_exporter_that_fails_leaves_the_module_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no\nsuch operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    factory = build(PPOConfig()).factory()
    assert factory.name == "rl_module"
    assert factory.reason == "the export failed: no such operator"


def test_an_unforeseen_error_on_the_way_leaves_the_module_serving(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(onnx_factory, "export_template", fail)
    factory = build(PPOConfig()).factory()
    assert factory.name == "rl_module"
    assert "KeyError" in factory.reason
    assert "no ONNX graph" in caplog.text


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (gym.spaces.Box(0, 255, (42, 42, 3), np.uint8), None),
        (gym.spaces.Box(0, 9, (3,), np.int32), None),
        (CARTPOLE, gym.spaces.MultiDiscrete([[2, 3], [2, 2]])),
    ],
)
def test_spaces_that_rllib_itself_cannot_take_are_refused_at_the_start(
    observations: gym.Space[Any], actions: gym.Space[Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    built = build(PPOConfig(), observations, actions)
    with pytest.raises(UnservableError, match="RLlib cannot act on observations of"):
        built.factory()
    assert "Traceback" not in caplog.text


class Picky(ConnectorV2):
    """Refuses what its application would never send."""

    def __call__(self, *, batch: dict[str, Any], episodes: Any, **kwargs: Any) -> dict[str, Any]:
        if episodes[0].get_observations(-1)[0] != 0:
            raise ValueError("outside the map")
        return batch


def test_a_connector_that_refuses_made_up_observations_is_served_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = build(PPOConfig(), CARTPOLE, None, Picky).factory().build(1, 0, cast("Any", None))
    assert "outside the map" in caplog.text
    rows = {"": np.zeros((2, 4), np.float32)}
    assert policy.infer(rows, flags(2, greedy=False), contexts(2)).actions[""].shape == (2,)


def test_choosing_an_engine_leaves_the_module_and_its_filters_alone() -> None:
    from ray.rllib.connectors.env_to_module import MeanStdFilter

    built = build(PPOConfig(), CARTPOLE, None, MeanStdFilter)
    before = {name: value.clone() for name, value in built.module.state_dict().items()}
    statistics = built.env_to_module.get_state()
    built.factory()
    assert all(torch.equal(before[name], now) for name, now in built.module.state_dict().items())
    assert str(built.env_to_module.get_state()) == str(statistics)


def test_both_engines_give_an_action_for_a_single_row() -> None:
    for built in (build(PPOConfig()), build(lstm())):
        policy = built.factory().build(4, 0, cast("Any", "view"))
        assert policy.version == 4
        assert policy.view == "view"  # type: ignore[attr-defined]
        observations = {"": np.zeros((1, 4), np.float32)}
        batch = policy.infer(observations, flags(1, greedy=False), contexts(1))
        assert batch.policy is policy
        assert batch.observations is observations
        assert batch.actions[""].dtype == np.int64
        assert batch.outputs["action_logp"].shape == (1,)
        assert batch.outputs["action_dist_inputs"].shape == (1, 2)
