"""CartPole drives its own loop and asks the policy server for every action."""

from ppo import ENVS, learn, ppo

from policy_server import PolicyServerConfig, PolicyServerEnvRunner

config = (
    ppo()
    .environment("CartPole-v1", env_config=PolicyServerConfig(port=0).to_env_config())
    .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
)

if __name__ == "__main__":
    learn(config, ["simulator.py", "remote", str(ENVS)])
