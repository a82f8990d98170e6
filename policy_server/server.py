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

import grpc
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
from client_sdk.wire.faults import Fault, Reason
from policy_server.auth import TokenInterceptor
from policy_server.buffer import ExperienceBuffer
from policy_server.config import PolicyServerConfig
from policy_server.experience import Policy
from policy_server.faults import incidents
from policy_server.parts import Parts
from policy_server.policy_store import PolicyStore
from policy_server.service import SERVICE_NAME
from policy_server.terms import Terms

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 2.0
_CALLS_END_S = 1.0
"""For the coroutines of calls whose last message is out, or whose connection is gone."""
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
        terms: Terms,
        *,
        policies: PolicyStore,
        buffer: ExperienceBuffer,
    ) -> None:
        """Prepare; nothing listens until ``start``.

        Args:
            config: Where to listen, what to admit.
            terms: On which clients act.
            policies: Where the newest policy is found.
            buffer: Where experience goes.
        """
        self._config = config
        self._terms = terms
        self._policies = policies
        self._buffer = buffer
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._address = ""
        self._degraded: str | None = None
        self._parts: Parts | None = None
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
        return {**parts.stats(), "incidents": incidents.count, **self._traffic.snapshot()}

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
        parts = self._parts = Parts(
            config, self._terms, self._policies, self._buffer, self._traffic
        )
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(config.token)] if config.token else [],
            options=_server_options(config),
        )
        server.add_generic_rpc_handlers((parts.service.handler(),))
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
            await _calls_ended()
            parts.sessions.close_all()
            if config.address_file is not None:
                remove_if_ours(config.address_file, self._address)

    async def _sweep_until_stopped(self, parts: Parts) -> None:
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
            self._parts.policy_arrived(policy)
            self._report_health()

    def _note_degraded(self) -> None:
        if self._parts is not None and self._degraded is not None:
            fault = Fault(
                Reason.NOT_READY,
                f"learning has failed on the server ({self._degraded}); actions go on under "
                "the last policy once it asks for experience again: ask again",
                retry_after_s=1.0,
            )
            self._parts.release(fault)
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


async def _calls_ended() -> None:
    """Let all other tasks of the loop come to their end.

    gRPC's own may outlive its ``stop``: it waits for what travels, not for the coroutines of calls.
    Where the end of the loop cancels these, gRPC prints a traceback for each.
    """
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_CALLS_END_S)


def _server_options(config: PolicyServerConfig) -> list[tuple[str, int]]:
    return server_options(config.max_message_bytes, config.max_message_bytes, config.keepalive_s)
