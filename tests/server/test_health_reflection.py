"""Starting, stopping, and what operators ask: health, reflection, addresses."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from policy_server import PolicyServerConfig, ServerTls
from policy_server.buffer import ExperienceBuffer
from policy_server.policy_store import PolicyStore
from policy_server.server import PolicyServer, ServerStartError
from policy_server.terms import Terms
from tests.authority import Authority
from tests.server.talk import Health, Talker, eventually, fault_in, health, rows, seen
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, serving

SERVICE = "policyserver.v1.PolicyService"


def unstarted(**settings) -> PolicyServer:
    """A server of its own, not listening yet."""
    return PolicyServer(
        PolicyServerConfig(**settings),
        Terms(CARTPOLE_OBSERVATIONS, CARTPOLE_ACTIONS, hold=False, logged_actions_need_logp=True),
        policies=PolicyStore(),
        buffer=ExperienceBuffer(100),
    )


# Health.


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_follows_the_first_policy_and_the_learner(service):
    with (
        serving(first_version=None) as server,
        Talker(server.address, connect=False) as talker,
    ):
        assert health(talker, service) == Health.NOT_SERVING
        server.publish(1)
        eventually(lambda: health(talker, service) == Health.SERVING)
        server.server.set_degraded("loss is NaN")
        eventually(lambda: health(talker, service) == Health.NOT_SERVING)
        server.server.set_degraded(None)
        eventually(lambda: health(talker, service) == Health.SERVING)


def test_inference_goes_on_while_the_learner_is_broken():
    with serving() as server, Talker(server.address) as talker:
        server.server.set_degraded("loss is NaN")
        eventually(lambda: health(talker) == Health.NOT_SERVING)
        talker.play(1, 5)


def test_health_watch_is_told_of_the_stop():
    with serving() as server, Talker(server.address, connect=False) as talker:
        watch = health_pb2_grpc.HealthStub(talker.channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert next(watch).status == Health.SERVING
        server.server.stop()
        assert next(watch).status == Health.NOT_SERVING


# Reflection.


def test_reflection_lists_the_services_and_knows_the_contract():
    with serving() as server, Talker(server.address, connect=False) as talker:
        stub = reflection_pb2_grpc.ServerReflectionStub(talker.channel)
        request = reflection_pb2.ServerReflectionRequest
        asked = [request(list_services=""), request(file_containing_symbol=SERVICE)]
        listed, described = stub.ServerReflectionInfo(iter(asked), timeout=5)
        names = {service.name for service in listed.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        assert any(
            b"StreamAct" in file
            for file in described.file_descriptor_response.file_descriptor_proto
        )


def test_every_method_of_the_contract_is_served():
    with serving() as server, Talker(server.address, connect=False) as talker:
        for method in pb.DESCRIPTOR.services_by_name["PolicyService"].methods:
            call = talker.channel.stream_stream(f"/{SERVICE}/{method.name}")(iter([b""]), timeout=5)
            try:
                list(call)
            except grpc.RpcError:
                assert call.code() is not grpc.StatusCode.UNIMPLEMENTED


# Where it listens.


def test_port_in_use_is_a_start_error_that_names_the_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = unstarted(port=port)
        begin = time.monotonic()
        with pytest.raises(ServerStartError, match=rf"127\.0\.0\.1:{port}.*in use.*--port"):
            server.start()
        assert time.monotonic() - begin < 2.0
        server.stop()


def test_port_in_use_by_another_copy_of_ourselves_is_a_start_error_too():
    with serving() as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(ServerStartError, match=rf"127\.0\.0\.1:{port}\b"):
            unstarted(port=port).start()
        with Talker(server.address) as talker:
            assert talker.step(1, 0) == 0


def test_address_of_another_machine_is_a_start_error():
    with pytest.raises(ServerStartError, match=r"192\.0\.2\.1:0.*not one of this machine"):
        unstarted(host="192.0.2.1", port=0, insecure=True).start()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_bound_address_is_one_to_connect_to(host):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with serving(host=host) as server, Talker(server.address) as talker:
        assert server.server.address == server.address
        assert talker.step(1, 0) == 0


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_address_file_holds_the_address_while_the_server_answers(tmp_path):
    path = tmp_path / "address"
    with serving(address_file=str(path)) as server:
        assert path.read_text() == server.address
        assert [file.name for file in tmp_path.iterdir()] == ["address"]
    assert list(tmp_path.iterdir()) == []


def test_address_file_of_a_successor_is_left_alone(tmp_path):
    path = tmp_path / "address"
    with serving(address_file=str(path)):
        path.write_text("127.0.0.1:1")
    assert path.read_text() == "127.0.0.1:1"


def test_address_file_that_cannot_be_written_is_a_start_error_and_frees_the_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = unstarted(port=port, address_file=str(tmp_path / "missing" / "address"))
    with pytest.raises(ServerStartError, match=r"missing/address.*--address-file"):
        server.start()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_certificates_that_are_none_are_a_start_error_that_names_them(tmp_path):
    certificate, key = Authority(tmp_path).issue("localhost")
    server = unstarted(port=0, tls=ServerTls(certificate, key))
    Path(certificate).write_text("garbage")  # since it was configured
    with pytest.raises(ServerStartError, match=rf"no good: .*PEM form, which '{certificate}'"):
        server.start()


# Stopping.


def test_stopping_is_quick_though_clients_wait():
    with serving(hold=True, drain_s=5.0) as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.send(rows([1], [0], seen(0)))
        idle = talker.stream()
        idle.ask()
        call = talker.begin(rows([2], [0], seen(0)))
        eventually(lambda: server.server.stats()["requests_waiting"] == 2)
        begin = time.monotonic()
        server.server.stop()
        assert time.monotonic() - begin < 2.0
        assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        assert fault_in(call.exception()).reason is Reason.DRAINING
        assert Reason(stream.receive().error.reason) is Reason.DRAINING
        for ended in (stream, idle):
            with pytest.raises(grpc.RpcError) as caught:
                ended.receive()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert fault_in(caught.value).reason is Reason.DRAINING


def test_stopping_does_not_wait_for_a_client_that_does_not_read():
    with serving(drain_s=0.3) as server, Talker(server.address) as talker:
        health_pb2_grpc.HealthStub(talker.channel).Watch(health_pb2.HealthCheckRequest())
        for _ in range(3):
            talker.stream().send()
        begin = time.monotonic()
        server.server.stop()
        assert time.monotonic() - begin < 2.5
        assert server.server._thread is None


def test_stopping_twice_and_before_starting_is_fine():
    unstarted().stop()
    with serving() as server:
        server.server.stop()
        server.server.stop()
        assert server.server.stats()["episodes_open"] == 0


def test_stopped_server_refuses_connections_and_its_port_is_free():
    with serving() as server:
        port = int(server.address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_server_can_be_told_things_before_it_starts_and_after_it_stopped():
    server = unstarted(port=0)
    server.set_degraded("early")
    assert server.stats() == {}
    assert (server.sessions, server.address) == (0, "")
    server.start()
    server.stop()
    server.set_degraded("late")


def test_sweep_that_fails_does_not_end_the_server(caplog):
    with serving() as server, Talker(server.address) as talker:
        parts = server.server._parts

        def broken() -> None:
            raise ZeroDivisionError

        expire, parts.sessions.expire = parts.sessions.expire, broken
        eventually(lambda: "looking after sessions failed" in caplog.text)
        parts.sessions.expire = expire
        assert talker.step(1, 0) == 0


def test_server_runs_beside_another_event_loop():
    """Its loop is its own: an application's running loop is not touched."""

    async def application() -> float:
        with serving() as server, Talker(server.address) as talker:
            return talker.step(1, 0)

    assert asyncio.run(application()) == 0
