"""Connect a simulator to a policy server, and learn. Needs neither ray nor torch."""

from client_sdk.aio import AsyncEpisode, AsyncEpisodeBatch, AsyncPolicyClient
from client_sdk.client import Episode, EpisodeBatch, PolicyClient
from client_sdk.config import Timeouts, TlsConfig
from client_sdk.errors import BatchError, PolicyClientError, PolicyTimeout
from client_sdk.remote_env import RemoteEnv
from client_sdk.remote_vector_env import RemoteVectorEnv
from client_sdk.session import ClientStats

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
