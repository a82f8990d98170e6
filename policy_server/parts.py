"""What lives on the loop, put together: who is connected, what runs, who answers.

Made and used by the loop thread, but for ``stats``.
"""

from __future__ import annotations

import asyncio
from typing import cast

from grpc_health.v1 import health

from client_sdk.traffic import Traffic
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.faults import Fault
from policy_server.acting import Acting
from policy_server.answers import AnswerEncoder
from policy_server.batcher import Batcher
from policy_server.buffer import ExperienceBuffer
from policy_server.chunk_reader import ChunkReader
from policy_server.config import PolicyServerConfig
from policy_server.downloads import Downloads
from policy_server.episodes import EpisodeStore
from policy_server.experience import Policy
from policy_server.handshake import Handshake
from policy_server.local import LocalInference
from policy_server.policy_files import ExportedPolicy, PolicyFiles
from policy_server.policy_store import PolicyStore
from policy_server.rate_limits import RateLimit
from policy_server.rows import RowRecorder
from policy_server.service import PolicyService
from policy_server.sessions import SessionRegistry
from policy_server.terms import Terms
from policy_server.upload_gate import UploadGate
from policy_server.uploads import UploadRecorder

_STEP_PAUSE_S = 0.05
"""A client that brings steps too fast goes on in small portions."""
_OPEN_PAUSE_S = 1.0
"""Those who are refused here may be many: they ask seldom."""
_LONGEST_PAUSE_S = 5.0
"""However far ahead of its pace a client is, it is told to ask again by then."""


class Parts:
    """One server's; see their modules.

    Attributes:
        health: What load balancers ask.
        store: Of the episodes.
        sessions: Who is connected.
        batcher: Brings actions.
        files: Of the policies.
        local: For clients that act alone.
        acting: For those that ask.
        service: What gRPC calls.
    """

    def __init__(
        self,
        config: PolicyServerConfig,
        terms: Terms,
        policies: PolicyStore,
        buffer: ExperienceBuffer,
        traffic: Traffic,
    ) -> None:
        self.health = health.aio.HealthServicer()
        self.store = EpisodeStore(
            buffer,
            max_open_per_session=config.max_open_episodes_per_session,
            max_open=config.max_open_episodes,
        )
        # A client that obeys is back within its lease.
        longest_s = min(config.lease_s / 3.0, _LONGEST_PAUSE_S)
        self._rates = (
            RateLimit(
                "max_steps_per_second_per_session",
                config.max_steps_per_second_per_session,
                pause_s=_STEP_PAUSE_S,
                longest_s=longest_s,
            ),
            RateLimit(
                "max_sessions_opened_per_second",
                config.max_sessions_opened_per_second,
                pause_s=_OPEN_PAUSE_S,
                longest_s=longest_s,
            ),
        )
        step_rate, open_rate = self._rates
        self.sessions = SessionRegistry(
            self.store,
            lease_s=config.lease_s,
            longest_answer_s=max(config.hold_timeout_s, config.wait_timeout_s),
            max_sessions=config.max_sessions,
            max_calls=config.max_calls_per_session,
            step_rate=step_rate,
            open_rate=open_rate,
            changed=buffer.connected,
        )
        self.batcher = Batcher(
            asyncio.get_running_loop(),
            policies,
            buffer,
            self.store,
            hold=terms.hold,
            hold_timeout_s=config.hold_timeout_s,
            wait_timeout_s=config.wait_timeout_s,
        )
        self.files = PolicyFiles(
            max_kept=config.policies_kept, max_remembered=config.policies_remembered
        )
        self._exported = terms.remote_only is None
        self.local = LocalInference(
            terms,
            Downloads(self.files),
            UploadRecorder(
                ChunkReader(terms, self.files), self.store, max_rows=config.max_rows_per_request
            ),
            UploadGate(
                buffer,
                hold=terms.hold,
                hold_timeout_s=config.hold_timeout_s,
                wait_timeout_s=config.wait_timeout_s,
            ),
            self.store,
            buffer,
        )
        self.acting = Acting(
            self.store,
            RowRecorder(terms, max_rows=config.max_rows_per_request),
            self.batcher,
            AnswerEncoder(SpaceCodec(terms.action_space)),
            max_open_episodes=config.max_open_episodes_per_session,
        )
        self.service = PolicyService(
            sessions=self.sessions,
            handshake=Handshake(config, terms, self.local),
            acting=self.acting,
            local=self.local,
            traffic=traffic,
            policy_version=lambda: policies.current.version if policies.current else 0,
            max_open_episodes=config.max_open_episodes_per_session,
        )

    def policy_arrived(self, policy: Policy) -> None:
        """A version was published."""
        self.note_policy(policy)
        self.batcher.policy_arrived()
        self.local.gate.policy_arrived()

    def note_policy(self, policy: Policy) -> None:
        """A version is there that nobody waits for."""
        if self._exported:
            self.files.add(cast("ExportedPolicy", policy))

    def demand_changed(self) -> None:
        """``sample()`` asks for experience, or took some."""
        self.store.settle()
        self.batcher.open_gate()
        self.local.gate.demand_changed()

    def release(self, fault: Fault) -> None:
        """Answer all that is held back with an error."""
        self.batcher.cancel(fault)
        self.local.gate.cancel(fault)

    def sweep(self) -> None:
        """What time brings about."""
        self.sessions.expire()
        self.batcher.expire()
        self.demand_changed()

    def stats(self) -> dict[str, float]:
        """Numbers for the metrics: who is connected, what was asked, what is held. Any thread."""
        return {
            "sessions": len(self.sessions),
            "sessions_opened": self.sessions.opened,
            "sessions_expired": self.sessions.expired,
            "episodes_open": self.store.open_episodes,
            "episodes_lost": self.sessions.episodes_lost,
            "requests": self.acting.requests,
            "requests_over_rate": sum(rate.refused for rate in self._rates),
            "requests_waiting": self.batcher.waiting + self.local.gate.waiting,
            "batches": self.batcher.batches,
            "actions": self.batcher.actions,
            "policy_downloads": self.local.downloads.downloads,
            "downloads_waiting": self.files.waiting,
            "chunks": self.local.recorder.taken,
            "chunks_refused": self.local.recorder.refused,
        }
