"""CartPole in a process of its own, which RLlib's env runner steps over gRPC."""

from ppo import ENVS, learn, ppo
from ray import tune

from policy_server.stepping import RemoteEnvCreator

tune.register_env("remote-cartpole", RemoteEnvCreator("CartPole-v1"))
config = (
    ppo()
    .environment("remote-cartpole")
    .env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=ENVS,
        # One message per step for all of them.
        gym_env_vectorize_mode="vector_entry_point",
    )
)

if __name__ == "__main__":
    learn(config)
