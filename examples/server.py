"""A policy server in RLlib's own idiom; `policy-server train` does this and more."""

from ray.rllib.algorithms.ppo import PPOConfig

from policy_server import PolicyServerConfig, PolicyServerEnvRunner

config = PPOConfig().env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
# Of CartPole-v1 it takes the spaces; the simulators step it.
config.environment("CartPole-v1", env_config=PolicyServerConfig(port=9900).to_env_config())
algo = config.build_algo()
for _ in range(100):
    print(algo.train()["env_runners"].get("episode_return_mean"))
algo.stop()
