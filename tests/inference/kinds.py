"""One module of every kind that has a graph: algorithm, observations, actions, connectors."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np
from modules import CARTPOLE, Built, build
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from client_sdk.wire.batches import SpaceCodec
from policy_server.onnx_engine.check import module_inputs, probe
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from policy_server.rl_module_engine import RLModuleFactory, RLModuleSpaces

Box, Discrete, MultiDiscrete = gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete

BOX = Box(-2.0, 3.0, (3,))
UNEVEN = Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
IMAGE = Box(0.0, 1.0, (24, 24, 3))
NESTED = gym.spaces.Dict(
    {
        "zoom": Discrete(3),
        "a/b": Box(-1.0, 1.0, (2, 3)),
        "pair": gym.spaces.Tuple(
            (MultiDiscrete([2, 3]), gym.spaces.MultiBinary(3), Box(-1.0, 1.0, ()))
        ),
        "camera": Box(0, 255, (3, 3), np.uint8),
        "double": Box(-np.inf, np.inf, (2,), np.float64),
        "depth": Box(0, 9, (2,), np.uint16),
        "wide": gym.spaces.Tuple((Box(0, 9, (2,), np.uint32), MultiDiscrete([2, 4], np.uint16))),
    }
)


def ppo(**model: Any) -> Any:
    return PPOConfig().rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[32, 32], **model))


def sac(**model: Any) -> Any:
    return SACConfig().rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[32, 32], **model))


def c51(**settings: Any) -> Any:
    return DQNConfig().training(num_atoms=11, v_min=-4.0, v_max=9.0, **settings)


def convolution(config: Any) -> Any:
    filters = [[8, 4, 2], [16, 3, 2, "valid"], [16, 4, 2]]
    return config.rl_module(model_config=DefaultModelConfig(conv_filters=filters))


def raw_actions(*, normalize: bool, clip: bool) -> Any:
    return ppo().environment(normalize_actions=normalize, clip_actions=clip)


MODULES: dict[str, Callable[[], Built]] = {
    "PPO Box to Discrete": lambda: build(ppo()),
    "PPO vf_share_layers": lambda: build(ppo(vf_share_layers=True)),
    "PPO Discrete that starts at 5": lambda: build(ppo(), CARTPOLE, Discrete(3, start=5)),
    "PPO hidden head, layer norm": lambda: build(
        ppo(head_fcnet_hiddens=[16], fcnet_use_layernorm=True, head_fcnet_use_layernorm=True)
    ),
    "PPO float64 observations": lambda: build(ppo(), Box(-9.0, 9.0, (5,), np.float64)),
    "PPO to Box": lambda: build(ppo(), CARTPOLE, BOX),
    "PPO to uneven Box": lambda: build(ppo(), CARTPOLE, UNEVEN),
    "PPO to float64 Box": lambda: build(ppo(), CARTPOLE, Box(-0.4, 0.4, (2,), np.float64)),
    "PPO to unbounded Box": lambda: build(ppo(), CARTPOLE, Box(-np.inf, np.inf, (2,))),
    "PPO to clipped Box": lambda: build(raw_actions(normalize=False, clip=True), CARTPOLE, UNEVEN),
    "PPO to raw Box": lambda: build(raw_actions(normalize=False, clip=False), CARTPOLE, BOX),
    "PPO free_log_std": lambda: build(ppo(free_log_std=True), CARTPOLE, BOX),
    "PPO narrow log_std_clip_param": lambda: build(ppo(log_std_clip_param=0.1), CARTPOLE, BOX),
    "PPO to MultiDiscrete": lambda: build(ppo(), CARTPOLE, MultiDiscrete([3, 2, 4])),
    "PPO to even MultiDiscrete": lambda: build(
        ppo(), CARTPOLE, MultiDiscrete([3, 3], start=[1, -1])
    ),
    "PPO to int32 MultiDiscrete": lambda: build(
        ppo(), CARTPOLE, MultiDiscrete([3, 2], dtype=np.int32)
    ),
    "PPO image": lambda: build(convolution(PPOConfig()), IMAGE, Discrete(4)),
    "PPO image to Box": lambda: build(convolution(PPOConfig()), IMAGE, BOX),
    "PPO flattened Discrete": lambda: build(ppo(), Discrete(5), None, FlattenObservations),
    "PPO flattened MultiDiscrete": lambda: build(
        ppo(), MultiDiscrete([3, 4], dtype=np.int32), None, FlattenObservations
    ),
    "PPO flattened Dict": lambda: build(ppo(), NESTED, None, FlattenObservations),
    "PPO flattened uint8 image": lambda: build(
        ppo(), Box(0, 255, (6, 6, 1), np.uint8), None, FlattenObservations
    ),
    "PPO filtered": lambda: build(ppo(), CARTPOLE, None, MeanStdFilter),
    "PPO flattened and filtered": lambda: build(
        ppo(), NESTED, BOX, FlattenObservations, MeanStdFilter
    ),
    "PPO filtered and flattened": lambda: build(
        ppo(), Box(-1.0, 1.0, (2, 3)), None, MeanStdFilter, FlattenObservations
    ),
    "APPO": lambda: build(APPOConfig(), CARTPOLE, BOX),
    "APPO image to Discrete": lambda: build(convolution(APPOConfig()), IMAGE, Discrete(3)),
    "APPO flattened Dict to MultiDiscrete": lambda: build(
        APPOConfig(), NESTED, MultiDiscrete([3, 2]), FlattenObservations
    ),
    "IMPALA": lambda: build(IMPALAConfig()),
    "IMPALA filtered to uneven Box": lambda: build(IMPALAConfig(), CARTPOLE, UNEVEN, MeanStdFilter),
    "DQN": lambda: build(DQNConfig(), CARTPOLE, Discrete(3)),
    "DQN plain, starts at -1": lambda: build(
        DQNConfig().training(dueling=False, double_q=False), CARTPOLE, Discrete(3, start=-1)
    ),
    "DQN image": lambda: build(convolution(DQNConfig()), IMAGE, Discrete(3)),
    "DQN flattened Dict": lambda: build(DQNConfig(), NESTED, Discrete(3), FlattenObservations),
    "DQN filtered": lambda: build(DQNConfig(), CARTPOLE, Discrete(3), MeanStdFilter),
    "C51": lambda: build(c51(), CARTPOLE, Discrete(3)),
    "C51 without dueling, starts at 2": lambda: build(
        c51(dueling=False), CARTPOLE, Discrete(3, start=2)
    ),
    "C51 image": lambda: build(convolution(c51()), IMAGE, Discrete(3)),
    "C51 flattened Dict": lambda: build(c51(), NESTED, Discrete(3), FlattenObservations),
    "SAC": lambda: build(sac(), CARTPOLE, BOX),
    "SAC to uneven Box": lambda: build(sac(), CARTPOLE, UNEVEN),
    "SAC to float64 Box": lambda: build(sac(), CARTPOLE, Box(-0.4, 0.4, (2,), np.float64)),
    "SAC to raw Box": lambda: build(sac().environment(normalize_actions=False), CARTPOLE, BOX),
    "SAC to Discrete that starts at 5": lambda: build(sac(), CARTPOLE, Discrete(3, start=5)),
    "SAC image": lambda: build(convolution(SACConfig()), IMAGE, BOX),
    "SAC flattened Dict": lambda: build(sac(), NESTED, BOX, FlattenObservations),
    "SAC filtered": lambda: build(sac(), CARTPOLE, BOX, MeanStdFilter),
} | {
    f"PPO {name}": lambda name=name: build(ppo(fcnet_activation=name))
    for name in ("linear", "relu", "elu", "swish", "silu", "LeakyReLU", "GELU", "Sigmoid")
}


def both(built: Built) -> tuple[OnnxEnginePolicy, Any]:
    """The same version as its graph and as its module."""
    rng = np.random.default_rng(5)
    codec = SpaceCodec(built.observation_space)
    # Filters see something first.
    module_inputs(built.module, built.env_to_module, codec, probe(codec, 30, rng), 30)
    factory = built.factory()
    assert factory.name == "onnx", factory.reason
    spaces = RLModuleSpaces(built.observation_space, built.action_space, lookback=1, shift=True)
    other = RLModuleFactory(
        "compared",
        module=built.module,
        env_to_module=built.env_to_module,
        module_to_env=built.module_to_env,
        spaces=spaces,
    )
    view = cast("Any", None)
    return cast("OnnxEnginePolicy", factory.build(1, 0, view)), other.build(1, 0, view)


@functools.cache
def built_as(name: str) -> tuple[Built, OnnxEnginePolicy, Any]:
    """One of the modules, its graph, and itself as a policy; not to be changed."""
    built = MODULES[name]()
    return built, *both(built)


def random_kind(seed: int) -> Built:
    """Any algorithm over any spaces that it takes, observations nested and flattened."""
    rng = random.Random(seed)
    config = rng.choice([ppo, sac, DQNConfig, c51, APPOConfig, IMPALAConfig])()
    connectors = [FlattenObservations, *rng.choice([[], [MeanStdFilter]])]
    observations = _random_observations(rng, depth=2)
    return build(config, observations, _random_actions(rng, config), *connectors, seed=seed)


def _random_observations(rng: random.Random, depth: int) -> gym.Space[Any]:
    if depth and rng.random() < 0.6:
        children = [_random_observations(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            return gym.spaces.Tuple(children)
        return gym.spaces.Dict({f"~{i}/": child for i, child in enumerate(children)})
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    leaves: list[Callable[[], gym.Space[Any]]] = [
        lambda: Box(-1.0, 1.0, tuple(sizes)),
        lambda: Box(-np.inf, np.inf, tuple(sizes), np.float64),
        lambda: Box(0, 255, tuple(sizes), rng.choice([np.uint8, np.uint32])),
        lambda: Discrete(sizes[0]),
        lambda: MultiDiscrete(sizes),
        lambda: gym.spaces.MultiBinary(sizes[0]),
    ]
    return rng.choice(leaves)()


def _random_actions(rng: random.Random, config: Any) -> gym.Space[Any]:
    discrete = Discrete(rng.randint(1, 6), start=rng.randint(-3, 3))
    if isinstance(config, DQNConfig):
        return discrete
    low = np.array([rng.uniform(-5, 0) for _ in range(rng.randint(1, 4))], np.float32)
    box = Box(low, low + np.float32(rng.uniform(0.1, 9.0)))
    if isinstance(config, SACConfig):
        return rng.choice([discrete, box])
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    return rng.choice([discrete, box, MultiDiscrete(sizes)])
