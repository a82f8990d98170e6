"""``policy-server check``: what answers at an address, and how fast. A client like any other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from client_sdk import PolicyClient
from client_sdk.config import Timeouts, TlsConfig
from client_sdk.errors import PolicyTimeout, UnavailableError
from client_sdk.wire import PROTOCOL_VERSION

_ACTIONS = 100
_PINGS = 20
_WARM_UP = 5
_ACTION_TIMEOUT_S = 2.0


def check(
    address: str,
    *,
    token: str | None = None,
    tls: TlsConfig | None = None,
    insecure: bool = False,
    timeout_s: float = 5.0,
) -> dict[str, str]:
    """Connect, agree on everything, ask for a few actions, leave.

    The actions belong to an evaluation episode, which nobody learns from.

    Args:
        address: HOST:PORT.
        token: Bearer token, where the server asks for one.
        tls: How to encrypt; None: plaintext.
        insecure: Send the token without TLS to another machine all the same.
        timeout_s: For connecting.

    Returns:
        What was found, by name, in the order to show it.

    Raises:
        PolicyClientError: No policy server answers there, or it refuses.
    """
    timeouts = Timeouts(connect_s=timeout_s, action_s=_ACTION_TIMEOUT_S, reconnect_s=timeout_s)
    began = time.perf_counter()
    with PolicyClient(
        address,
        token=token,
        tls=tls,
        insecure=insecure,
        timeouts=timeouts,
        name="policy-server check",
    ) as client:
        handshake_s = time.perf_counter() - began
        found = {
            "address": address,
            "handshake": f"{handshake_s * 1e3:.1f} ms",
            "round trip": f"{_median_ms([client.ping() for _ in range(_WARM_UP + _PINGS)]):.2f} ms",
            "protocol": f"policyserver.v1, {PROTOCOL_VERSION}",
            "inference": "remote",
            "observation space": describe(client.observation_space),
            "action space": describe(client.action_space),
            "client config": _listed(client.config),
        }
        try:
            latencies_s = _latencies(client)
        except (UnavailableError, PolicyTimeout) as error:
            return {**found, "policy": f"none yet: {error}"}
        found["policy version"] = str(client.policy_version)
        found["action p50"] = f"{_median_ms(latencies_s):.2f} ms"
        found["action p99"] = f"{np.quantile(latencies_s, 0.99) * 1e3:.2f} ms"
    return found


def _median_ms(seconds: list[float]) -> float:
    return float(np.median(seconds)) * 1e3


def _latencies(client: PolicyClient) -> list[float]:
    observation = client.observation_space.sample()
    latencies_s = []
    with client.episode(training_enabled=False, explore=False) as episode:
        for _ in range(_WARM_UP + _ACTIONS):
            began = time.perf_counter()
            episode.act(observation)
            latencies_s.append(time.perf_counter() - began)
        episode.abandon()
    return latencies_s[_WARM_UP:]


def describe(space: gymnasium.Space[Any]) -> str:
    """A space in a few words: kind, dtype, shape; not its bounds by element."""
    if isinstance(space, spaces.Box):
        return f"Box {space.dtype} {list(space.shape)}"
    if isinstance(space, spaces.Discrete):
        start = f" from {space.start}" if space.start else ""
        return f"Discrete {space.n}{start}"
    if isinstance(space, spaces.Dict):
        inner = ", ".join(f"{key}: {describe(value)}" for key, value in space.items())
        return f"Dict({inner})"
    if isinstance(space, spaces.Tuple):
        return f"Tuple({', '.join(describe(value) for value in space)})"
    return str(space)


def table(found: Mapping[str, str]) -> str:
    """The names to the left, what was found to the right."""
    width = max(len(name) for name in found)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())


def _listed(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in config.items()) or "-"
