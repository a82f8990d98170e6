"""The training side: an RLlib env runner that serves its policy to simulators over gRPC.

Name it in any algorithm's config::

    from policy_server import PolicyServerConfig, PolicyServerEnvRunner

    config = (
        PPOConfig()
        .environment(
            observation_space=observation_space,
            action_space=action_space,
            env_config=PolicyServerConfig(port=9900).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
    )
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from client_sdk.config import ServerTls
from policy_server.config import PolicyServerConfig

if TYPE_CHECKING:
    from policy_server.env_runner import PolicyServerEnvRunner

__all__ = ["PolicyServerConfig", "PolicyServerEnvRunner", "ServerTls"]


def __getattr__(name: str) -> Any:
    # Ray and torch take seconds to import; configuration, commands and --help need neither.
    if name == "PolicyServerEnvRunner":
        from policy_server.env_runner import PolicyServerEnvRunner

        return PolicyServerEnvRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
