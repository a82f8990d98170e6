"""Connect a simulator to a policy server, and learn. Needs neither ray nor torch."""

from client_sdk.aio import AsyncPolicyClient
from client_sdk.aio_episode import AsyncEpisode, AsyncEpisodeBatch
from client_sdk.client import PolicyClient
from client_sdk.config import Timeouts, TlsConfig
from client_sdk.episode import Episode, EpisodeBatch
from client_sdk.errors import BatchError, PolicyClientError, PolicyTimeout
from client_sdk.remote_env import RemoteEnv
from client_sdk.remote_vector_env import RemoteVectorEnv
from client_sdk.stats import ClientStats

__all__ = [
    "AsyncEpisode",
    "AsyncEpisodeBatch",
    "AsyncPolicyClient",
    "BatchError",
    "ClientStats",
    "Episode",
    "EpisodeBatch",
    "PolicyClient",
    "PolicyClientError",
    "PolicyTimeout",
    "RemoteEnv",
    "RemoteVectorEnv",
    "Timeouts",
    "TlsConfig",
]
