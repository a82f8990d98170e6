"""onnx_policy.js: a policy file says the same to JavaScript as to Python."""

import json
from pathlib import Path

import numpy as np
import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig

from client_sdk.onnx_policy import OnnxPolicy
from tests.inference.modules import build
from tests.javascript.support import EXAMPLE, node

HERE = Path(__file__).parent
MODULE = EXAMPLE / "onnx_policy.js"


@pytest.mark.parametrize("config", [PPOConfig, DQNConfig])
def test_same_noise_gives_the_same_outputs(config, tmp_path):
    file = build(config()).factory().build(7, 0, None).model
    (tmp_path / "policy.onnx").write_bytes(file)
    policy = OnnxPolicy(file)
    observation = np.array([0.1, -0.2, 0.03, 0.4], np.float32)
    noise = np.linspace(0.1, 0.9, policy.spec.noise.size, dtype=np.float32)
    roles = tuple(policy.spec.roles)
    expected = policy.run({"": observation[None]}, noise[None], roles)

    given = (observation.tolist(), noise.tolist())
    got = json.loads(node(HERE / "acting.mjs", MODULE, tmp_path / "policy.onnx", *given))
    assert got["version"] == 7
    for role, value in zip(roles, expected, strict=True):
        np.testing.assert_allclose(got["outputs"][role], value.ravel(), rtol=1e-5)


# Of 100,000 numbers; the tolerance is many standard errors.
@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [
        ("gumbel", np.euler_gamma, np.pi**2 / 6),
        ("normal", 0.0, 1.0),
        ("uniform", 0.5, 1 / 12),
    ],
)
def test_noise_has_its_distribution(kind, mean, variance):
    assert json.loads(node(HERE / "noise.mjs", MODULE, kind)) == pytest.approx(
        [mean, variance], abs=0.06
    )
