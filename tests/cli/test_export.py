"""``policy-server export``: from a checkpoint to a file that any ONNX runtime runs."""

import hashlib
import json
import pickle
import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.policy_spec import FilterSpec
from client_sdk.wire.batches import SpaceCodec
from policy_server import cli
from policy_server.commands import export
from policy_server.commands.checkpoints import CheckpointDirectory
from policy_server.onnx_engine import parity
from policy_server.onnx_engine.check import module_inputs, probe
from policy_server.rl_module_engine import frozen_pipeline
from tests.documents import blocks
from tests.runner.support import simulating
from tests.training.support import address_of, building, over_cartpole

pytestmark = pytest.mark.timeout(120)

BOX = gymnasium.spaces.Box(-2.0, 3.0, (2,))
NESTED = gymnasium.spaces.Dict(
    {"gear": gymnasium.spaces.Discrete(3), "speed": gymnasium.spaces.Box(-9.0, 9.0, (2,))}
)
SMALL = {"fcnet_hiddens": [8]}


def over(config, observation_space, action_space=None):
    config = over_cartpole(config).environment(observation_space=observation_space)
    if action_space is not None:
        config.environment(action_space=action_space)
    return config.rl_module(model_config=SMALL)


def flattening(*_, **__):
    return [FlattenObservations()]


CARTPOLE = gymnasium.make("CartPole-v1").observation_space
CONFIGS = {
    "PPO": lambda: over(PPOConfig(), NESTED, BOX).env_runners(env_to_module_connector=flattening),
    "APPO": lambda: over_cartpole(APPOConfig()).env_runners(num_env_runners=0),
    "DQN": lambda: over(DQNConfig(), CARTPOLE).training(epsilon=[(0, 0.7), (10, 0.5)]),
    "SAC": lambda: over(SACConfig(), CARTPOLE, BOX),
}


def run(capsys, *arguments):
    """Exit code, lines of standard output, lines of standard error."""
    try:
        code = cli.main(("export", *map(str, arguments)))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_of_each_algorithm_becomes_a_file_that_agrees_with_it(
    ray_session, tmp_path, capsys, name
):
    config = CONFIGS[name]()
    with building(config) as algo:
        algo.save_to_path(tmp_path / "checkpoint")
        served = algo.env_runner._policies.current
    file = tmp_path / "policy.onnx"
    capsys.readouterr()
    code, out, err = run(capsys, tmp_path / "checkpoint", file)
    assert (code, err) == (0, [])
    # Byte by byte what the server itself acted with.
    assert file.read_bytes() == served.model
    said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out)
    assert said["sha256"] == hashlib.sha256(served.model).hexdigest()
    assert said["policy"] == f"default_policy of {name}, version 0"
    assert "1,000 random observations" in said["compared"]
    assert said["greedy actions"] == "100.0% are equal"
    assert ("action_logp" in said) == (name != "DQN")


@pytest.fixture(scope="module")
def trained(ray_session, tmp_path_factory):
    """A directory like that of ``--checkpoint-dir``, its observations filtered, and its policy."""
    config = over(PPOConfig(), CARTPOLE).env_runners(
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter(), num_env_runners=1
    )
    config.training(train_batch_size=100, minibatch_size=50, num_epochs=1)
    path = tmp_path_factory.mktemp("trained")
    space = gymnasium.spaces.Box(-1.0, 4.0, (4,))
    with building(config) as algo:
        with simulating(address_of(algo), space=space, rows=4):
            for _ in range(2):
                algo.train()
        CheckpointDirectory(path).write(2, algo.save_to_path)
    return path


def test_the_newest_of_a_directory_of_checkpoints_is_exported_with_its_filter(
    trained, tmp_path, capsys
):
    code, _, err = run(capsys, trained, tmp_path / "policy.onnx")
    assert (code, err) == (0, [])
    policy = OnnxPolicy((tmp_path / "policy.onnx").read_bytes())
    assert policy.version == 2
    assert policy.spec.observation_filter == FilterSpec("mean_std", 10.0)
    # Filtered by what it has seen, an observation far away is cut off at the bound.
    noise = np.zeros((2, 2), np.float32)
    rows = {"": np.array([[1e3] * 4, [1e6] * 4], np.float32)}
    (inputs,) = policy.run(rows, noise, ("action_dist_inputs",))
    assert np.array_equal(inputs[0], inputs[1])


def test_a_training_without_a_policy_server_is_exported_as_well(ray_session, tmp_path, capsys):
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(
            num_env_runners=0,
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
        )
        .training(train_batch_size=100, minibatch_size=50, num_epochs=1)
        .rl_module(model_config=SMALL)
    )
    algo = config.build_algo()
    try:
        algo.train()
        algo.save_to_path(tmp_path / "checkpoint")
        codec = SpaceCodec(CARTPOLE)
        rows = probe(codec, 50, np.random.default_rng(0))
        module = algo.env_runner.module
        pipeline = frozen_pipeline(algo.env_runner._env_to_module)
        with torch.no_grad():
            batch = module_inputs(module, pipeline, codec, rows, 50)
            wanted = module.forward_inference(batch)["action_dist_inputs"].numpy()
    finally:
        algo.stop()
    capsys.readouterr()
    code, _, err = run(capsys, tmp_path / "checkpoint", tmp_path / "policy.onnx")
    assert (code, err) == (0, [])
    policy = OnnxPolicy((tmp_path / "policy.onnx").read_bytes())
    (found,) = policy.run(rows, np.zeros((50, 2), np.float32), ("action_dist_inputs",))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_exporting_starts_no_ray_and_the_file_runs_without_this_project(trained, tmp_path):
    program = (
        "import sys; from policy_server.cli import main; code = main(sys.argv[1:])\n"
        "import ray; sys.exit(code or ray.is_initialized())"
    )
    file = tmp_path / "policy.onnx"
    commands = [
        [sys.executable, "-c", program, "export", str(trained), str(file)],
        [sys.executable, "-I", "-c", blocks("docs/onnx.md", "python")[0], str(file)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert np.isin(json.loads(done.stdout), (0, 1)).all()


def test_a_policy_that_has_no_graph_is_refused_with_the_reason(ray_session, tmp_path, capsys):
    config = over_cartpole(PPOConfig()).rl_module(
        model_config={"fcnet_hiddens": [8], "use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 4}
    )
    with building(config) as algo:
        algo.save_to_path(tmp_path / "checkpoint")
    capsys.readouterr()
    code, out, (line,) = run(capsys, tmp_path / "checkpoint", tmp_path / "policy.onnx")
    assert (code, out) == (1, [])
    assert "cannot be exported: DefaultPPOTorchRLModule is recurrent" in line
    assert not (tmp_path / "policy.onnx").exists()


def test_a_file_that_differs_from_the_module_is_not_written(trained, tmp_path, capsys, monkeypatch):
    rllib_inputs = parity.rllib_inputs

    def different(*arguments):
        role, inputs = rllib_inputs(*arguments)
        return role, inputs + 1e-3

    monkeypatch.setattr(parity, "rllib_inputs", different)
    (tmp_path / "policy.onnx").write_text("the one before")
    code, out, (line,) = run(capsys, trained, tmp_path / "policy.onnx")
    assert (code, out) == (1, [])
    assert "differs from DefaultPPOTorchRLModule: action_dist_inputs differ by" in line
    assert (tmp_path / "policy.onnx").read_text() == "the one before"


def test_a_failed_write_leaves_the_file_that_was_there(trained, tmp_path, capsys, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Path, "replace", full)
    (tmp_path / "policy.onnx").write_text("the one before")
    code, _, (line,) = run(capsys, trained, tmp_path / "policy.onnx")
    assert code == 1
    assert line.endswith("No space left on device")
    assert [each.name for each in tmp_path.iterdir()] == ["policy.onnx"]
    assert (tmp_path / "policy.onnx").read_text() == "the one before"


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys):
    for checkpoint, said in (("nowhere", "no such directory"), ("", "is no checkpoint")):
        code, out, (line,) = run(capsys, tmp_path / checkpoint, tmp_path / "policy.onnx")
        assert (code, out) == (2, [])
        assert "argument CHECKPOINT: " in line
        assert said in line
    assert not list(tmp_path.iterdir())


def checkpoint_of(path, *policies):
    """The outline of one."""
    for policy in policies:
        (path / "learner_group/learner/rl_module" / policy).mkdir(parents=True)
    (path / "rllib_checkpoint.json").write_text("{}")
    return path


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path / "damaged", "default_policy")
    code, _, (line,) = run(capsys, checkpoint, tmp_path / "policy.onnx")
    assert code == 2
    assert "FileNotFoundError" in line
    (checkpoint / "class_and_ctor_args.pkl").write_bytes(pickle.dumps({})[:-1])
    code, _, (line,) = run(capsys, checkpoint, tmp_path / "policy.onnx")
    assert code == 2
    assert f"cannot read {checkpoint}" in line


def test_a_checkpoint_of_several_policies_is_refused_in_one_line(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path / "several", "left", "right")
    code, _, (line,) = run(capsys, checkpoint, tmp_path / "policy.onnx")
    assert code == 2
    assert "expected the one policy 'default_policy', found left, right" in line


def test_a_target_that_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    for file, said in ((tmp_path / "no" / "policy.onnx", "no such directory"), (tmp_path, "is a")):
        code, _, (line,) = run(capsys, tmp_path, file)
        assert code == 2
        assert "argument FILE" in line
        assert said in line
