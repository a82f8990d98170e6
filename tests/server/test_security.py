"""Who may call, and who can listen in: tokens and TLS."""

from __future__ import annotations

import grpc
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from policy_server import ServerTls
from tests.authority import Authority
from tests.server.talk import Health, Talker, fault_in, health, refused, rows, seen
from tests.servers import serving

TOKEN = "correct-horse-battery"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED

WRONG_TOKENS = {
    "missing": (None, "asks for a token"),
    "wrong": ("wrong", "wrong token"),
    "prefix": (TOKEN[:-1], "wrong token"),
    "longer": (TOKEN + "x", "wrong token"),
    "empty": ("", "wrong token"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_call_without_the_right_token_is_unauthenticated(case, caplog):
    caplog.set_level("DEBUG")
    token, says = WRONG_TOKENS[case]
    with (
        serving(token=TOKEN) as server,
        Talker(server.address, connect=False, token=token) as talker,
    ):
        with refused(UNAUTHENTICATED, Reason.UNAUTHENTICATED, "", says) as found:
            talker.open()
        assert TOKEN not in found[0].message
        with refused(UNAUTHENTICATED, Reason.UNAUTHENTICATED, "", says):
            talker.act(rows([1], [0], seen(0)))
        stream = talker.stream()
        stream.send()
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert caught.value.code() is UNAUTHENTICATED
        assert fault_in(caught.value).reason is Reason.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            talker.channel.unary_unary("/policyserver.v1.PolicyService/Nothing")(b"", timeout=5)
        assert caught.value.code() is UNAUTHENTICATED
        assert server.server.sessions == 0
    assert TOKEN not in caplog.text
    assert not token or token == "wrong" or token not in caplog.text


def test_right_token_opens_everything():
    with serving(token=TOKEN) as server, Talker(server.address, token=TOKEN) as talker:
        assert talker.step(1, 0) == 0
        assert talker.stream().ask(rows([1], [1], seen(0))).act.groups[0].HasField("actions")


@pytest.mark.parametrize("header", [TOKEN, f"bearer {TOKEN}", f"Basic {TOKEN}", f"Bearer  {TOKEN}"])
def test_token_must_come_as_a_bearer(header):
    with serving(token=TOKEN) as server, Talker(server.address, connect=False) as talker:
        talker.metadata = (("authorization", header),)
        with refused(UNAUTHENTICATED, Reason.UNAUTHENTICATED, "", "wrong token"):
            talker.open()


def test_health_asks_for_no_token():
    with serving(token=TOKEN) as server, Talker(server.address, connect=False) as talker:
        assert health(talker) == Health.SERVING


def test_session_id_is_in_no_log(caplog):
    caplog.set_level("DEBUG")
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        talker.open(session_id=talker.session_id)
        with pytest.raises(grpc.RpcError):
            talker.act(session_id=talker.session_id[::-1])
        talker.close_session()
    assert "connected" in caplog.text
    assert "resumed" in caplog.text
    assert talker.session_id not in caplog.text


# TLS.


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def test_tls_client_that_knows_the_authority_is_served(authority):
    certificate, key = authority.issue("localhost")
    with serving(tls=ServerTls(certificate, key), token=TOKEN, host="0.0.0.0") as server:
        credentials = grpc.ssl_channel_credentials(authority.pem)
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        with Talker(address, credentials=credentials, token=TOKEN) as talker:
            assert talker.step(1, 0) == 0
            stream = talker.stream()
            assert stream.ask(rows([1], [1], seen(0))).act.groups[0].HasField("actions")


def unreachable(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """What a client that cannot get in is told."""
    with Talker(address, credentials=credentials, connect=False) as talker:
        with pytest.raises(grpc.RpcError) as caught:
            talker.open()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        return caught.value.details()


def test_tls_client_that_trusts_another_authority_does_not_connect(authority, tmp_path_factory):
    certificate, key = authority.issue("localhost")
    stranger = Authority(tmp_path_factory.mktemp("stranger"))
    with serving(tls=ServerTls(certificate, key)) as server:
        details = unreachable(server.address, grpc.ssl_channel_credentials(stranger.pem))
        assert "CERTIFICATE_VERIFY_FAILED" in details


def test_plaintext_client_on_a_tls_port_and_the_reverse_do_not_connect(authority):
    certificate, key = authority.issue("localhost")
    with serving(tls=ServerTls(certificate, key)) as server:
        unreachable(server.address, None)
        with Talker(
            server.address, credentials=grpc.ssl_channel_credentials(authority.pem)
        ) as talker:
            assert talker.step(1, 0) == 0  # the server is unharmed
    with serving() as server:
        unreachable(server.address, grpc.ssl_channel_credentials(authority.pem))
        with Talker(server.address) as talker:
            assert talker.step(1, 0) == 0


def test_client_without_a_certificate_is_not_served_where_one_is_asked_for(authority):
    certificate, key = authority.issue("localhost")
    own, own_key = authority.issue("simulator")
    with serving(tls=ServerTls(certificate, key, client_ca=authority.file)) as server:
        unreachable(server.address, grpc.ssl_channel_credentials(authority.pem))
        with open(own, "rb") as chain, open(own_key, "rb") as private:
            credentials = grpc.ssl_channel_credentials(authority.pem, private.read(), chain.read())
        with Talker(server.address, credentials=credentials) as talker:
            assert talker.step(1, 0) == 0


def test_unknown_method_is_unimplemented_and_harms_nobody():
    with serving() as server, Talker(server.address) as talker:
        with pytest.raises(grpc.RpcError) as caught:
            talker.channel.unary_unary("/policyserver.v1.PolicyService/Nothing")(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert talker.act() == pb.ActResponse()
