"""The gRPC server in its own thread and event loop: bind, serve, drain, stop.

Created and stopped by the actor thread. Everything that clients do happens on the loop; the only
seams to the actor thread are the ``ExperienceBuffer`` and the ``PolicyStore``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Any, cast

import grpc
import gymnasium as gym
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from client_sdk.listening import (
    ServerStartError,
    bind,
    remove_if_ours,
    server_options,
    write_atomically,
)
from client_sdk.traffic import Traffic
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from policy_server.acting import Acting
from policy_server.answers import AnswerEncoder
from policy_server.auth import TokenInterceptor
from policy_server.batcher import Batcher
from policy_server.buffer import ExperienceBuffer
from policy_server.chunk_reader import ChunkReader
from policy_server.config import PolicyServerConfig
from policy_server.downloads import Downloads
from policy_server.episodes import EpisodeStore
from policy_server.experience import Policy
from policy_server.faults import incidents
from policy_server.handshake import Handshake
from policy_server.local import LocalInference
from policy_server.policy_files import ExportedPolicy, PolicyFiles
from policy_server.policy_store import PolicyStore
from policy_server.rows import RowRecorder
from policy_server.service import SERVICE_NAME, PolicyService
from policy_server.sessions import SessionRegistry
from policy_server.upload_gate import UploadGate
from policy_server.uploads import UploadRecorder

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 2.0
_LEDGER_TIMEOUT_S = 1.0
_SWEEP_S = 0.1
"""Leases and waiting requests are looked at this often."""

_HEALTH_SERVICES = ("", SERVICE_NAME)


class PolicyServer:
    """Serves one policy to many clients.

    Thread-safe where marked; ``start`` and ``stop`` are for the thread that created it. Not usable
    after a fork.
    """

    def __init__(
        self,
        config: PolicyServerConfig,
        *,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        policies: PolicyStore,
        buffer: ExperienceBuffer,
        hold: bool,
        logged_actions_need_logp: bool,
        normalize_actions: bool = True,
        remote_only: str | None = None,
        steps_per_upload: int = 100,
    ) -> None:
        """Prepare; nothing listens until ``start``.

        Args:
            config: Where to listen, what to admit.
            observation_space: Of the application's observations, before any connector.
            action_space: Of the actions that the application executes.
            policies: Where the newest policy is found.
            buffer: Where experience goes.
            hold: Actions for training episodes wait while nobody asks for experience.
            logged_actions_need_logp: The algorithm corrects for the behaviour's log-density.
            normalize_actions: RLlib's setting of that name.
            remote_only: Why clients cannot act alone; None: the policies have ONNX files.
            steps_per_upload: How many steps clients that act alone send at a time.
        """
        self._config = config
        self._observation_space = observation_space
        self._action_space = action_space
        self._policies = policies
        self._buffer = buffer
        self._hold = hold
        self._need_logp = logged_actions_need_logp
        self._normalize = normalize_actions
        self._remote_only = remote_only
        self._steps_per_upload = steps_per_upload
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._address = ""
        self._degraded: str | None = None
        self._parts: _Parts | None = None
        self._traffic = Traffic()

    # Actor thread.

    def start(self) -> str:
        """Listen and answer.

        Returns:
            The bound address, HOST:PORT.

        Raises:
            ServerStartError: The port is in use, or the certificates are no good.
        """
        self._thread = threading.Thread(
            target=self._run, name=f"policy-server-{self._config.port}", daemon=True
        )
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise ServerStartError(
                f"the server on {self._config.host}:{self._config.port} did not start within "
                f"{_START_TIMEOUT_S:g} s"
            )
        if self._start_error is not None:
            self._thread.join()
            raise ServerStartError(str(self._start_error)) from self._start_error
        return self._address

    def stop(self) -> None:
        """Drain and end, within ``drain_s`` and a little. Stopping twice is fine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._call_soon(lambda: self._stopping.set() if self._stopping else None)
        thread.join(self._config.drain_s + _STOP_MARGIN_S)
        if thread.is_alive():
            logger.error("the server on %s did not stop in time", self._address)
        self._buffer.close()

    @property
    def address(self) -> str:
        """HOST:PORT as bound; empty before ``start``. Any thread."""
        return self._address

    # Any thread.

    @property
    def sessions(self) -> int:
        """Connected clients."""
        return len(self._parts.sessions) if self._parts is not None else 0

    def set_degraded(self, why: str | None) -> None:
        """Say that learning is broken (or, with None, that it is well again).

        Health checks are told, and held requests are released with an error.
        """
        self._degraded = why
        self._call_soon(self._note_degraded)

    def stats(self) -> dict[str, float]:
        """Numbers for the metrics: who is connected, what was asked, what is held."""
        parts = self._parts
        if parts is None:
            return {}
        return {
            "sessions": len(parts.sessions),
            "sessions_opened": parts.sessions.opened,
            "sessions_expired": parts.sessions.expired,
            "episodes_open": parts.store.open_episodes,
            "episodes_lost": parts.sessions.episodes_lost,
            "requests": parts.acting.requests,
            "requests_waiting": parts.batcher.waiting + parts.local.gate.waiting,
            "batches": parts.batcher.batches,
            "actions": parts.batcher.actions,
            "policy_downloads": parts.local.downloads.downloads,
            "downloads_waiting": parts.files.waiting,
            "chunks": parts.local.recorder.taken,
            "chunks_refused": parts.local.recorder.refused,
            "incidents": incidents.count,
            **self._traffic.snapshot(),
        }

    def ledger(self) -> dict[str, int]:
        """Where every step went, of one moment: received = held + all the others.

        Waits for the loop, which alone knows what is held; for the thread that hands over.
        """
        moment: concurrent.futures.Future[dict[str, int]] = concurrent.futures.Future()

        def read() -> None:
            moment.set_result({**self._buffer.ledger.snapshot(), "held": self._buffer.held})

        self._call_soon(read)
        try:
            return moment.result(_LEDGER_TIMEOUT_S)
        except TimeoutError:  # the loop has ended, or is busy: then what can be seen from here
            return {**self._buffer.ledger.snapshot(), "held": self._buffer.held}

    def _call_soon(self, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(function)
            except RuntimeError:  # the loop has ended
                logger.debug("the server's loop has ended")

    # The server's thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # told to whoever called start(), or logged
            self._start_error = error
            if self._started.is_set():
                logger.exception("the policy server ended unexpectedly")
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        config = self._config
        parts = self._parts = _Parts(self)
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(config.token)] if config.token else [],
            options=_server_options(config),
        )
        server.add_generic_rpc_handlers((self._traffic.counting(parts.service.handler()),))
        health_pb2_grpc.add_HealthServicer_to_server(parts.health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        self._address = bind(server, config.host, config.port, config.tls)
        unsubscribe = self._policies.subscribe(
            lambda policy: self._call_soon(lambda: self._policy_arrived(policy))
        )
        if self._policies.current is not None:
            parts.note_policy(self._policies.current)
        try:
            await server.start()
            self._buffer.attach(lambda: self._call_soon(parts.demand_changed))
            await self._update_health()
            if config.address_file is not None:
                write_atomically(config.address_file, self._address)
            logger.info("policy server listening on %s", self._address)
            self._started.set()
            await self._sweep_until_stopped(parts)
        finally:
            unsubscribe()
            parts.service.drain()
            await parts.health.enter_graceful_shutdown()
            await server.stop(config.drain_s)
            parts.sessions.close_all()
            if config.address_file is not None:
                remove_if_ours(config.address_file, self._address)

    async def _sweep_until_stopped(self, parts: _Parts) -> None:
        if self._stopping is None:
            return
        while True:
            try:
                await asyncio.wait_for(self._stopping.wait(), _SWEEP_S)
                return
            except TimeoutError:
                try:
                    parts.sweep()
                except Exception as error:  # the server outlives a bug of one sweep
                    incidents.record("looking after sessions failed", error)

    def _policy_arrived(self, policy: Policy) -> None:
        if self._parts is not None:
            self._parts.note_policy(policy)
            self._parts.batcher.policy_arrived()
            self._parts.local.gate.policy_arrived()
            self._report_health()

    def _note_degraded(self) -> None:
        if self._parts is not None and self._degraded is not None:
            fault = Fault(
                Reason.NOT_READY,
                f"learning has failed on the server ({self._degraded}); actions go on under "
                "the last policy once it asks for experience again: ask again",
                retry_after_s=1.0,
            )
            self._parts.batcher.cancel(fault)
            self._parts.local.gate.cancel(fault)
        self._report_health()

    def _report_health(self) -> None:
        task = asyncio.ensure_future(self._update_health())
        # The loop keeps only weak references to tasks.
        self._health_task = task

    async def _update_health(self) -> None:
        if self._parts is None:
            return
        ready = self._policies.current is not None and self._degraded is None
        status = health_pb2.HealthCheckResponse
        for name in _HEALTH_SERVICES:
            await self._parts.health.set(name, status.SERVING if ready else status.NOT_SERVING)


class _Parts:
    """What lives on the loop, put together."""

    def __init__(self, server: PolicyServer) -> None:
        config = server._config
        self.health = health.aio.HealthServicer()
        self.store = EpisodeStore(
            server._buffer,
            max_open_per_session=config.max_open_episodes_per_session,
            max_open=config.max_open_episodes,
        )
        self.sessions = SessionRegistry(
            self.store,
            lease_s=config.lease_s,
            max_sessions=config.max_sessions,
            max_calls=config.max_calls_per_session,
            changed=server._buffer.connected,
        )
        self.batcher = Batcher(
            asyncio.get_running_loop(),
            server._policies,
            server._buffer,
            self.store,
            hold=server._hold,
            hold_timeout_s=config.hold_timeout_s,
            wait_timeout_s=config.wait_timeout_s,
        )
        self.files = PolicyFiles(
            max_kept=config.policies_kept, max_remembered=config.policies_remembered
        )
        self._exported = server._remote_only is None
        reader = ChunkReader(
            server._observation_space,
            server._action_space,
            self.files,
            normalize_actions=server._normalize,
            logged_actions_need_logp=server._need_logp,
        )
        self.local = LocalInference(
            Downloads(self.files),
            UploadRecorder(reader, self.store, max_rows=config.max_rows_per_request),
            UploadGate(
                server._buffer,
                hold=server._hold,
                hold_timeout_s=config.hold_timeout_s,
                wait_timeout_s=config.wait_timeout_s,
            ),
            self.store,
            server._buffer,
            impossible=server._remote_only,
            steps_per_upload=server._steps_per_upload,
            hold=server._hold,
        )
        self.acting = Acting(
            self.store,
            RowRecorder(
                server._observation_space,
                server._action_space,
                max_rows=config.max_rows_per_request,
                normalize_actions=server._normalize,
                logged_actions_need_logp=server._need_logp,
            ),
            self.batcher,
            AnswerEncoder(SpaceCodec(server._action_space)),
            max_open_episodes=config.max_open_episodes_per_session,
        )
        self.service = PolicyService(
            sessions=self.sessions,
            handshake=Handshake(
                observation_space=server._observation_space,
                action_space=server._action_space,
                lease_s=config.lease_s,
                limits=pb.Limits(
                    max_rows_per_request=config.max_rows_per_request,
                    max_open_episodes=config.max_open_episodes_per_session,
                    max_message_bytes=config.max_message_bytes,
                ),
                client_config=config.client_config,
                local=self.local,
            ),
            acting=self.acting,
            local=self.local,
            policy_version=lambda: (
                server._policies.current.version if server._policies.current else 0
            ),
            max_open_episodes=config.max_open_episodes_per_session,
        )

    def note_policy(self, policy: Policy) -> None:
        """A version was published."""
        if self._exported:
            self.files.add(cast("ExportedPolicy", policy))

    def demand_changed(self) -> None:
        """``sample()`` asks for experience, or took some."""
        self.store.settle()
        self.batcher.open_gate()
        self.local.gate.demand_changed()

    def sweep(self) -> None:
        """What time brings about."""
        self.sessions.expire()
        self.batcher.expire()
        self.demand_changed()


def _server_options(config: PolicyServerConfig) -> list[tuple[str, int]]:
    return server_options(config.max_message_bytes, config.max_message_bytes, config.keepalive_s)
