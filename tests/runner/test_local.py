"""Clients that act alone, against a whole runner."""

from __future__ import annotations

import grpc
import pytest
from ray.rllib.algorithms.dqn import DQNConfig

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire.faults import Reason
from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from tests.runner.support import ACTIONS, OBSERVATIONS, ppo_config, running
from tests.server.talk import refused
from tests.server.uploading import Uploader


def dqn_config():
    return (
        DQNConfig()
        .environment(
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            env_config=PolicyServerConfig(port=0, drain_s=0.2).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner)
        .rl_module(model_config={"fcnet_hiddens": [8]})
    )


@pytest.mark.parametrize("make_config", [ppo_config, dqn_config], ids=["PPO", "DQN"])
def test_weights_that_the_learner_sends_reach_the_clients_that_wait(make_config):
    with running(make_config()) as runner, Uploader(runner.address) as client:
        first = client.download().check()
        assert OnnxPolicy(first.model).version == first.header.policy_version == 0
        call = client.asking(first.header.sha256, wait_s=15)
        weights = {name: array * 2 for name, array in runner.module.get_state().items()}
        runner.set_state({"rl_module": weights, "weights_seq_no": 4})
        header = next(call).header
        assert header.policy_version == 4
        model = b"".join(part.piece for part in call)
        assert model == runner._policies.current.model != first.model


def test_session_is_told_what_the_algorithm_needs():
    with running(ppo_config()) as runner, Uploader(runner.address, connect=False) as client:
        told = client.open()
        assert (told.steps_per_upload, told.holds) == (2, True)
    with running(dqn_config()) as runner, Uploader(runner.address, connect=False) as client:
        told = client.open()
        assert (told.steps_per_upload, told.holds) == (16, False)


def test_policy_that_cannot_be_exported_is_for_remote_clients_only():
    config = ppo_config().rl_module(model_config={"use_lstm": True, "lstm_cell_size": 8})
    code = grpc.StatusCode.FAILED_PRECONDITION
    with (
        running(config) as runner,
        Uploader(runner.address, connect=False) as client,
        refused(code, Reason.NO_LOCAL_INFERENCE, "inference_mode", "recurrent"),
    ):
        client.open()
