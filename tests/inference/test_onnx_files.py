"""Policy files: exported once, patched per version, complete and portable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from modules import CARTPOLE, Built, build, contexts, flags
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.policy_spec import FilterSpec, NoiseSpec, PolicyFileError, PolicySpec, StateSpec
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.spaces import space_from_proto
from policy_server.onnx_engine import template as template_module
from policy_server.onnx_engine.check import module_inputs, probe, randomize
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from policy_server.onnx_engine.operators import PORTABLE_OPERATORS, NotExportableError
from policy_server.onnx_engine.plan import plan_graph
from policy_server.onnx_engine.template import export_template, refreshed_values

BOX = gym.spaces.Box(-2.0, 2.0, (3,))
NESTED = gym.spaces.Dict({"a/b": gym.spaces.Discrete(3), "c": BOX})


def policy_of(built: Built, version: int = 1, env_steps: int = 0) -> OnnxEnginePolicy:
    policy = built.factory().build(version, env_steps, cast("Any", None))
    assert isinstance(policy, OnnxEnginePolicy)
    return policy


def answers(policy: Any, observations: Any, n: int) -> dict[str, Any]:
    """By role, and with the same noise each time."""
    loaded = OnnxPolicy(policy.model)
    noise = NoisePool(loaded.spec.noise, np.random.default_rng(3)).take(flags(n, greedy=False))
    roles = tuple(loaded.spec.roles)
    return dict(zip(roles, loaded.run(observations, noise, roles), strict=True))


def change(built: Built) -> None:
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.copy_(torch.randn_like(parameter))


PATCHED = {
    "mlp": lambda: build(PPOConfig(), CARTPOLE, BOX),
    "free_log_std": lambda: build(
        PPOConfig().rl_module(model_config=DefaultModelConfig(free_log_std=True)), CARTPOLE, BOX
    ),
    "shared": lambda: build(
        PPOConfig().rl_module(model_config=DefaultModelConfig(vf_share_layers=True))
    ),
    "image": lambda: build(
        PPOConfig().rl_module(
            model_config=DefaultModelConfig(conv_filters=[[8, 4, 2], [16, 3, 2, "valid"]])
        ),
        gym.spaces.Box(0.0, 1.0, (16, 16, 3)),
    ),
    "dueling": lambda: build(DQNConfig().training(epsilon=[(0, 1.0), (100, 0.0)])),
    "atoms": lambda: build(DQNConfig().training(num_atoms=5)),
    "squashed": lambda: build(SACConfig(), CARTPOLE, BOX),
    "filtered": lambda: build(PPOConfig(), CARTPOLE, None, MeanStdFilter),
}


@pytest.mark.parametrize("name", PATCHED)
def test_patched_weights_equal_a_fresh_export(name: str) -> None:
    built = PATCHED[name]()
    codec = SpaceCodec(built.observation_space)
    factory = built.factory()
    observations = probe(codec, 40, np.random.default_rng(1))
    first = factory.build(1, 0, cast("Any", None))
    before = answers(first, observations, 40)
    change(built)
    module_inputs(built.module, built.env_to_module, codec, observations, 40)
    patched = answers(factory.build(2, 50, cast("Any", None)), observations, 40)
    fresh = answers(policy_of(built, 2, 50), observations, 40)
    for role, values in fresh.items():
        assert np.array_equal(patched[role], values), role
    # And what was published before is as it was.
    for role, values in answers(first, observations, 40).items():
        assert np.array_equal(before[role], values), role
    assert any(not np.array_equal(before[role], fresh[role]) for role in fresh)


def test_equal_weights_are_not_merged_into_one() -> None:
    built = build(PPOConfig())
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.zero_()
    factory = built.factory()
    assert factory.name == "onnx"
    change(built)
    policy = factory.build(1, 0, cast("Any", None))
    observations = probe(SpaceCodec(CARTPOLE), 5, np.random.default_rng(1))
    with torch.no_grad():
        wanted = built.module.forward_inference({"obs": torch.from_numpy(observations[""])})
    np.testing.assert_allclose(
        answers(policy, observations, 5)["action_dist_inputs"],
        wanted["action_dist_inputs"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_template_whose_tensors_the_exporter_merged_is_refused() -> None:
    built = build(PPOConfig())
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.zero_()
    pipelines = (built.env_to_module, built.module_to_env)
    plan = plan_graph(built.module, CARTPOLE, built.action_space, *pipelines)
    with pytest.raises(NotExportableError, match="no initializer"):
        export_template(plan, OnnxPolicy(policy_of(built).model).spec)


def test_filling_a_slot_with_another_shape_is_refused() -> None:
    built = build(PPOConfig())
    pipelines = (built.env_to_module, built.module_to_env)
    plan = plan_graph(built.module, CARTPOLE, built.action_space, *pipelines)
    spec = OnnxPolicy(policy_of(built).model).spec
    randomize(plan.graph, np.random.default_rng(0))
    template = export_template(plan, spec)
    values = refreshed_values(plan.graph)
    name = next(iter(values))
    with pytest.raises(ValueError, match=r"expected float32 .* got float32 \[1\]"):
        template.fill({**values, name: np.zeros(1, np.float32)}, 1)


def test_a_file_says_what_a_program_in_any_language_must_know() -> None:
    built = build(PPOConfig(), NESTED, BOX, FlattenObservations)
    policy = policy_of(built, version=42)
    model = onnx.load_from_string(policy.model)
    props = {each.key: each.value for each in model.metadata_props}
    spec = PolicySpec.from_metadata(props)
    assert spec == OnnxPolicy(policy.model).spec
    assert spec.to_metadata() == props
    assert (spec.policy_id, spec.version, spec.algorithm) == ("default_policy", 42, "PPO")
    assert (spec.distribution, spec.noise) == ("diag_gaussian", NoiseSpec("normal", 3, 0.0))
    assert spec.recorded == ("action_logp", "action_dist_inputs")
    assert spec.roles == {
        "actions": "actions",
        "env_actions": "env_actions",
        "action_logp": "action_logp",
        "action_dist_inputs": "action_dist_inputs",
    }
    assert [(each.path, each.dtype, each.shape) for each in spec.inputs] == [
        ("a~1b", "int64", ()),
        ("c", "float32", (3,)),
    ]
    for said, space in ((spec.observation_space, NESTED), (spec.action_space, BOX)):
        assert space_from_proto(json_format.Parse(said, pb.Space())) == space
    assert (spec.states, spec.observation_filter) == ((), None)
    for key in ("inputs", "noise", "roles", "recorded", "states", "observation_filter"):
        json.loads(props[f"policyserver.{key}"])
    onnx.checker.check_model(model, full_check=True)


def test_a_graph_of_operators_that_game_engines_lack_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_module, "PORTABLE_OPERATORS", PORTABLE_OPERATORS - {"Tanh"})
    factory = build(PPOConfig()).factory()
    assert factory.name == "rl_module"
    assert factory.reason == "the graph holds Tanh, which game engines cannot run"


def test_a_file_names_the_filter_that_is_folded_in() -> None:
    spec = OnnxPolicy(policy_of(build(PPOConfig(), CARTPOLE, None, MeanStdFilter)).model).spec
    assert spec.observation_filter == FilterSpec("mean_std", 10.0)
    assert OnnxPolicy(policy_of(build(PPOConfig())).model).spec.observation_filter is None


def test_a_recurrent_policys_file_is_refused() -> None:
    spec = OnnxPolicy(policy_of(build(PPOConfig())).model).spec
    memory = StateSpec("state_in_h", "state_out_h", "float32", (8,))
    model = onnx.load_from_string(policy_of(build(PPOConfig())).model)
    recurrent = dataclasses.replace(spec, states=(memory,)).to_metadata()
    for each in model.metadata_props:
        each.value = recurrent[each.key]
    with pytest.raises(PolicyFileError, match="recurrent"):
        OnnxPolicy(model.SerializeToString())


def test_equal_policies_are_equal_files() -> None:
    """Byte by byte, whatever else their processes did; a file is known by its hash."""
    connectors = (FlattenObservations, MeanStdFilter)
    first, second = (policy_of(build(PPOConfig(), NESTED, BOX, *connectors)) for _ in range(2))
    assert first.model == second.model
    script = (
        "import sys, hashlib, gymnasium as gym\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from test_onnx_files import *\n"
        "built = build(PPOConfig(), NESTED, BOX, FlattenObservations, MeanStdFilter)\n"
        "print(hashlib.sha256(policy_of(built).model).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(first.model).hexdigest()


def test_a_q_policy_records_no_outputs() -> None:
    spec = OnnxPolicy(policy_of(build(DQNConfig())).model).spec
    assert spec.recorded == ()
    assert spec.noise == NoiseSpec("uniform", 2, 1.0)
    assert spec.roles["env_actions"] == "actions"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: model[: len(model) // 2], "cannot load"),
        (lambda model: b"", "cannot load"),
        (lambda model: model.replace(b"policyserver.noise", b"policyserver.nosie"), "damaged"),
        (lambda model: model.replace(b"policyserver.schema", b"policyserver.schemo"), "without"),
    ],
)
def test_a_damaged_file_is_refused(damage: Any, said: str) -> None:
    model = policy_of(build(PPOConfig())).model
    with pytest.raises(PolicyFileError, match=said):
        OnnxPolicy(damage(model))


def test_loading_and_running_a_policy_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    file = tmp_path / "policy.onnx"
    file.write_bytes(policy_of(build(PPOConfig())).model)
    script = (
        "import sys, numpy, pathlib, client_sdk.onnx_policy as p\n"
        "policy = p.OnnxPolicy(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "rows = {'': numpy.zeros((3, 4), numpy.float32)}\n"
        "actions, _, _ = policy.act(rows, numpy.zeros(3, bool))\n"
        "assert actions[''].shape == (3,)\n"
        "heavy = {'ray', 'torch', 'onnx', 'grpc', 'gymnasium'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not {"ray", "torch", "onnx"} & set(json.loads(done.stdout.replace("'", '"')))


# -- noise


@pytest.mark.parametrize("kind", ["gumbel", "normal", "uniform"])
def test_noise_is_drawn_in_bulk_without_repeating_itself(kind: Any) -> None:
    pool = NoisePool(NoiseSpec(kind, 3, 0.5), np.random.default_rng(0))
    sizes = [1, 64, 2000, 4000, 1, 9000, 7]
    taken = [pool.take(flags(n, greedy=False)) for n in sizes]
    assert [each.shape for each in taken] == [(n, 3) for n in sizes]
    assert all(each.dtype == np.float32 for each in taken)
    numbers = np.concatenate(taken)
    assert np.isfinite(numbers).all()
    assert len(np.unique(numbers, axis=0)) == sum(sizes)


def test_greedy_rows_get_the_greedy_number_and_their_neighbours_noise() -> None:
    pool = NoisePool(NoiseSpec("uniform", 2, 1.0), np.random.default_rng(0))
    greedy = np.array([True, False, True])
    noise = pool.take(greedy)
    assert (noise[greedy] == 1.0).all()
    assert (noise[~greedy] < 1.0).all()
    assert (pool.take(flags(1, greedy=True)) == 1.0).all()


# -- speed


def test_a_row_costs_little_more_than_the_graph_alone() -> None:
    """A guard against a tenfold loss; the benchmarks measure."""
    built = build(PPOConfig().rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64])))
    policy = policy_of(built)
    observations, greedy, context = (
        {"": np.zeros((1, 4), np.float32)},
        flags(1, greedy=False),
        contexts(1),
    )
    best = min(
        _seconds(lambda: policy.infer(observations, greedy, context), 200) for _ in range(20)
    )
    assert best < 200e-6


def _seconds(call: Any, repeats: int) -> float:
    begin = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - begin) / repeats
