"""Configurations for `policy-server train --config` whose training gets stuck, or breaks, somewhere."""

import threading

import gymnasium
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner


def _block(where):
    print(f"stuck in {where}", flush=True)
    threading.Event().wait(60)


class StuckLearner(PPOTorchLearner):
    def update(self, *_, **__):
        _block("learning")


class BrokenLearner(PPOTorchLearner):
    def update(self, *_, **__):
        raise ArithmeticError("no gradient\ntoday")


class StuckCheckpoint(PPO):
    def save_to_path(self, *arguments, **options):
        super().save_to_path(*arguments, **options)
        _block("checkpointing")


def _config(algo_class=PPO, learner_class=PPOTorchLearner):
    env = gymnasium.make("CartPole-v1")
    return (
        PPOConfig(algo_class)
        .environment(observation_space=env.observation_space, action_space=env.action_space)
        .learners(num_learners=0)
        .training(
            learner_class=learner_class,
            train_batch_size_per_learner=200,
            minibatch_size=100,
            num_epochs=1,
        )
    )


def learning():
    return _config(learner_class=StuckLearner)


def broken():
    return _config(learner_class=BrokenLearner)


def checkpointing():
    return _config(StuckCheckpoint)
