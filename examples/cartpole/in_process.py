"""CartPole inside RLlib's own env runner: no server, no messages. What the others are held against."""

from ppo import ENVS, learn, ppo

config = (
    ppo().environment("CartPole-v1").env_runners(num_env_runners=0, num_envs_per_env_runner=ENVS)
)

if __name__ == "__main__":
    learn(config)
