"""A policy server in RLlib's own idiom; `policy-server train` does this and more."""

import sys

import gymnasium
from ray.rllib.algorithms.ppo import PPOConfig

from policy_server import PolicyServerConfig, PolicyServerEnvRunner

spaces = gymnasium.make("CartPole-v1")  # for its spaces; it never steps here
server = PolicyServerConfig(port=int(sys.argv[1]) if len(sys.argv) > 1 else 9900)
config = (
    PPOConfig()
    .environment(
        observation_space=spaces.observation_space,
        action_space=spaces.action_space,
        env_config=server.to_env_config(),
    )
    .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
)
algo = config.build_algo()
for iteration in range(int(sys.argv[2]) if len(sys.argv) > 2 else 100):
    result = algo.train()
    print(iteration, result["env_runners"].get("episode_return_mean"))
algo.stop()
