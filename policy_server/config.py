"""``PolicyServerConfig``: everything that can be set on a policy server, in one frozen value."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from numbers import Integral, Real
from typing import Any, Literal

from client_sdk.config import ServerTls, check_exposure, is_token

ENV_CONFIG_KEY = "policy_server"
"""Where ``to_env_config`` puts it inside RLlib's ``env_config``."""

_LONGEST_S = 1e6
"""Bound of everything in seconds: every wait ends."""

_SECRET = ("token", "tls")
"""Fields of which messages show the type alone."""
_POSITIVE_SECONDS = ("hold_timeout_s", "wait_timeout_s", "sample_wait_s", "lease_s", "keepalive_s")
_RATES = ("max_steps_per_second_per_session", "max_sessions_opened_per_second")
_COUNTS = (
    "max_sessions",
    "max_open_episodes_per_session",
    "max_open_episodes",
    "max_rows_per_request",
    "max_calls_per_session",
    "max_message_bytes",
    "policies_kept",
    "policies_remembered",
)


@dataclasses.dataclass(frozen=True)
class PolicyServerConfig:
    """Where a policy server listens, what it admits, and how acting and learning interleave.

    Travels inside RLlib's ``env_config``::

        config.environment(env_config=PolicyServerConfig(port=9900).to_env_config())

    Raises:
        ValueError: A value is out of range; the message names the field.
        TypeError: A key is unknown.
    """

    host: str = "127.0.0.1"
    """Interface to listen on. Anything but loopback needs ``tls`` and ``token``, or ``insecure``."""
    port: int = 9900
    """TCP port; 0 takes a free one."""
    address_file: str | None = None
    """The bound HOST:PORT is written here, atomically, once the server answers."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """Bearer token that every call must carry; None: none is asked for."""
    tls: ServerTls | None = None
    """Certificates; None: plaintext."""
    insecure: bool = False
    """Listen beyond loopback without TLS and token all the same."""

    while_learning: Literal["auto", "hold", "serve"] = "auto"
    """What happens to actions for training episodes while RLlib learns: ``"hold"`` delays them until
    the next ``sample()`` or a newer policy, ``"serve"`` goes on under the newest policy. ``"auto"``
    is hold for synchronous on-policy algorithms (PPO) and serve for the others."""
    hold_timeout_s: float = 20.0
    """A held request is answered NOT_READY after this long; asking again is safe."""
    max_policy_lag: int | Literal["auto"] | None = "auto"
    """Experience that many versions old or older still counts at hand-over, anything older is
    discarded; None: no limit. ``"auto"`` is 1 for on-policy algorithms, no limit for the others."""
    when_full: Literal["wait", "discard"] = "wait"
    """When the buffer is full: delay answers, or drop the oldest experience."""
    wait_timeout_s: float = 20.0
    """An answer delayed by a full buffer becomes RESOURCE_EXHAUSTED after this long."""
    buffer_fragments: float = 2.0
    """Size of the experience buffer in fragments of ``sample()``; running episodes count. At least
    256 steps for off-policy algorithms, whose fragments are short."""
    sample_wait_s: float = 3.0
    """``sample()`` returns what is there after this long."""

    awaits_checkpoint: bool = False
    """A checkpoint is restored after the start: the weights that RLlib begins with (number 0), random
    ones, are not served. Where the checkpoint's may have that number, too, call the runners'
    ``checkpoint_restored`` after them."""

    lease_s: float = 30.0
    """A session that nobody named for this long ends; its episodes are truncated."""
    max_sessions: int = 1024
    """Connected clients."""
    max_open_episodes_per_session: int = 4096
    """Running episodes of one client."""
    max_open_episodes: int = 16384
    """Running episodes of all clients."""
    max_calls_per_session: int = 256
    """Streams and unary calls of one client that may be under way at once."""
    max_steps_per_second_per_session: float = 1e6
    """Env steps of one client, on average over a second, whether it asks for actions or uploads. The
    default is more than a server can take: lower it so that no client crowds out the others."""
    max_sessions_opened_per_second: float = 200.0
    """New sessions of all clients, on average over a second; to resume one is always allowed."""
    max_rows_per_request: int = 4096
    """Rows in one request, all groups together."""
    max_message_bytes: int = 64 * 1024 * 1024
    """One request or answer."""
    policies_kept: int = 16
    """Policy files that stay loaded, fewer if they are large: uploads that name one of these are
    checked against it."""
    policies_remembered: int = 1000
    """Policy files that uploads may name at all; experience of older ones is refused."""
    steps_per_upload: int | Literal["auto"] = "auto"
    """How many steps a client that acts alone is asked to upload at a time; less in hold mode where
    there are so many clients that their uploads would not fit into the buffer. ``"auto"`` is an
    eighth of a fragment, at most 1000."""
    keepalive_s: float = 10.0
    """A silent connection is probed this often, and given up after as long again without answer."""
    drain_s: float = 2.0
    """How long calls under way may finish when the server stops."""
    client_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Told to every client as ``client.config``: level, difficulty, frame skip. JSON values."""

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # whatever their annotations say

        def check(condition: bool, field: str, expected: str) -> None:
            if not condition:
                value = given[field]
                got = type(value).__name__ if field in _SECRET else repr(value)
                raise ValueError(f"PolicyServerConfig.{field}: expected {expected}, got {got}")

        def check_number(field: str, low: float, high: float, kind: type, expected: str) -> None:
            value = given[field]
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            check(is_number and low <= value <= high, field, expected)

        check(isinstance(given["host"], str) and self.host != "", "host", "a host name or address")
        check_number("port", 0, 65535, Integral, "0 to 65535")
        file = given["address_file"]
        check(file is None or isinstance(file, str), "address_file", "a path or None")
        token = given["token"]
        check(
            token is None or is_token(token),
            "token",
            "printable ASCII without spaces, or None",
        )
        check(
            self.while_learning in ("auto", "hold", "serve"),
            "while_learning",
            '"auto", "hold" or "serve"',
        )
        for field in ("awaits_checkpoint", "insecure"):
            check(isinstance(given[field], bool), field, "True or False")
        check(self.when_full in ("wait", "discard"), "when_full", '"wait" or "discard"')
        if self.max_policy_lag not in (None, "auto"):
            check_number(
                "max_policy_lag", 0, math.inf, Integral, 'a number of versions, None or "auto"'
            )
        if self.steps_per_upload != "auto":
            check_number("steps_per_upload", 1, 2**31 - 1, Integral, 'a number of steps or "auto"')
        for field in _POSITIVE_SECONDS:
            check_number(field, 1e-3, _LONGEST_S, Real, "a number of seconds, 0.001 to 1e6")
        check_number("drain_s", 0, _LONGEST_S, Real, "a number of seconds, 0 to 1e6")
        check_number("buffer_fragments", 1, 1e6, Real, "a number from 1 to 1e6")
        for field in _RATES:
            check_number(field, 1e-3, 1e9, Real, "a number by second, 0.001 to 1e9")
        for field in _COUNTS:
            # gRPC keeps sizes in 32 bits.
            check_number(field, 1, 2**31 - 1, Integral, "a whole number, 1 to 2147483647")
        check(
            isinstance(given["client_config"], dict) and _is_json(self.client_config),
            "client_config",
            "a dict of JSON values with strings as keys",
        )
        if isinstance(self.tls, dict):  # after a trip through JSON
            with contextlib.suppress(TypeError):  # keys that are no fields, or too few
                object.__setattr__(self, "tls", ServerTls(**self.tls))
        tls = given["tls"]
        check(tls is None or isinstance(tls, ServerTls), "tls", "a ServerTls, its dict, or None")
        if self.tls is not None:
            self.tls.check()
        check_exposure(self.host, protected=bool(self.tls and self.token), insecure=self.insecure)

    def to_env_config(self) -> dict[str, Any]:
        """The ``env_config`` that carries this configuration through RLlib."""
        return {ENV_CONFIG_KEY: dataclasses.asdict(self)}

    @classmethod
    def from_env_config(cls, env_config: dict[str, Any]) -> PolicyServerConfig:
        """What ``to_env_config`` made; the defaults where nothing was set.

        Raises:
            ValueError: An unknown key, named.
        """
        values = dict(env_config.get(ENV_CONFIG_KEY, {}))
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f'env_config["{ENV_CONFIG_KEY}"]: unknown key {unknown[0]!r}; '
                f"known keys: {', '.join(sorted(known))}"
            )
        return cls(**values)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)
