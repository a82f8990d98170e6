"""remote.js: every action from the server."""

import contextlib
import re

import pytest

from client_sdk.wire import policyserver_pb2 as pb
from policy_server import ServerTls
from tests.authority import Authority
from tests.client.support import Relay, ScriptedServer
from tests.javascript.support import node, output_of, running
from tests.server.talk import eventually
from tests.servers import serving

EPISODE = re.compile(r"^episode (\d+): return (\d+), policy version (\d+)$", re.MULTILINE)


def play(server, *arguments):
    return running("remote.js", "--server", server.address, *arguments)


def ends_of(server):
    """What has been reported of the episodes that have ended."""
    return [chunk.end for chunk in server.collect(10_000, timeout_s=0.1) if chunk.end is not None]


def port_of(server):
    return int(server.address.rpartition(":")[2])


@pytest.mark.parametrize("envs", [1, 4])
def test_episodes_arrive(envs):
    with serving() as server:
        output = node("remote.js", "--server", server.address, "--episodes", 9, "--envs", envs)
        assert server.unaccounted() == 0
        ends = ends_of(server)
        printed = sorted(int(total) for _, total, _ in EPISODE.findall(output))
        assert len(printed) == 9
        assert sorted(end.episode_return for end in ends) == printed
        assert server.ledger()["received"] == sum(printed)


def test_a_refusal_is_told_in_the_words_of_the_server(tmp_path):
    token = tmp_path / "token"
    token.write_text("left")
    with (
        serving(token="right") as server,
        play(server, "--token-file", token) as process,
    ):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert errors.startswith("wrong token: pass the one that")
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [("--sever", "a:1"), ("--episodes", "many"), ("--envs", 0), ("--token-file", "/no/such/file")],
)
def test_a_bad_option_is_answered_with_those_that_there_are(arguments):
    with running("remote.js", *arguments) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert str(arguments[-1]) in errors or arguments[0] in errors
    assert "--server localhost:9900" in errors
    assert "    at " not in errors  # no stack


def test_a_token_opens_the_door(tmp_path):
    token = tmp_path / "token"
    token.write_text("right\n")
    with serving(token="right") as server:
        arguments = ("--server", server.address, "--token-file", token, "--episodes", 1)
        assert len(EPISODE.findall(node("remote.js", *arguments))) == 1


def test_tls_hides_what_is_said(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("localhost", ip=None)
    with serving(tls=ServerTls(certificate, key)) as server:
        arguments = ("--server", f"localhost:{port_of(server)}", "--episodes", 1)
        output = node("remote.js", *arguments, "--tls-ca", authority.file)
        assert len(EPISODE.findall(output)) == 1


def test_redirects_are_followed():
    with ScriptedServer() as first, serving() as server:
        first.on_open = lambda hello: pb.OpenSessionResponse(redirect_address=server.address)
        output = node("remote.js", "--server", first.address, "--episodes", 2)
        assert len(EPISODE.findall(output)) == 2
        assert server.ledger()["received"] > 0
        assert len(first.hellos) == 1


def test_actions_may_wait_for_the_first_policy():
    with serving(first_version=None) as server, play(server, "--episodes", 2) as process:
        eventually(lambda: server.server.stats()["requests"] > 0)
        server.publish(7)
        assert {version for *_, version in EPISODE.findall(output_of(process))} == {"7"}


def test_actions_may_wait_while_the_server_learns():
    held = {"hold": True, "hold_timeout_s": 0.1, "first_version": 1}
    with serving(**held) as server, play(server, "--episodes", 3, "--envs", 2) as process:
        steps = 0
        while process.poll() is None:
            steps += sum(chunk.steps for chunk in server.collect(5, timeout_s=0.2))
        returns = [int(total) for _, total, _ in EPISODE.findall(output_of(process))]
        assert len(returns) == 3
        steps += sum(chunk.steps for chunk in server.collect(10_000, timeout_s=0.1))
        assert steps == sum(returns)


def test_a_cut_connection_costs_nothing():
    with serving() as server, Relay(server.address) as relay:
        with play(relay, "--episodes", 300) as process:
            eventually(lambda: server.ledger()["received"] > 0)
            relay.cut()
            returns = [int(total) for _, total, _ in EPISODE.findall(output_of(process))]
        assert server.server.stats()["sessions_opened"] == 1
        assert len(returns) == 300
        assert server.ledger()["received"] == sum(returns)


def test_it_goes_on_where_the_server_was_restarted():
    with contextlib.ExitStack() as stack:
        # It takes no more than 5 steps, and the first episode has 8 at least.
        with serving(capacity_steps=5) as first:
            process = stack.enter_context(play(first, "--episodes", 3))
            eventually(lambda: first.server.stats()["requests_waiting"] > 0)
        with serving(port=port_of(first)) as second:
            output = output_of(process)
            assert "our session is over" in output
            assert len(EPISODE.findall(output)) == 3
            assert second.unaccounted() == 0
            # The return of the episode that had begun elsewhere would mislead.
            assert sum(not end.reported for end in ends_of(second)) == 1
