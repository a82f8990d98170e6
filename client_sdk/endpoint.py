"""``Endpoint``: where a server is, who we are to it, and how channels to it are set up. Immutable."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc

from client_sdk.config import Address, TlsConfig


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Of a policy server, or of a host of environments."""

    address: Address
    tls: TlsConfig | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    peer: str = "policy server"
    """What is expected there, as messages call it."""
    welcome: str = "open a session"
    """What it does first, likewise."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: plaintext."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.read("root_certificates"),
            private_key=self.tls.read("key"),
            certificate_chain=self.tls.read("certificate"),
        )

    def options(self, target: Address) -> list[tuple[str, Any]]:
        """Channel options for this server, or for ``target`` that it named instead of itself."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # Half-open connections are noticed within 20 s.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # What really bounds the wait for a ping's answer; else it is a minute.
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Retries are ours, and each attempt starts afresh: no memory of the last one.
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if target.is_loopback:
            options.append(("grpc.enable_http_proxy", 0))
        if target != self.address and self.tls is not None:
            options.append(("grpc.ssl_target_name_override", self.address.host))
        return options
