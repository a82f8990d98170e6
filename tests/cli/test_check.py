"""`policy-server check` against real servers."""

import re

import pytest
from gymnasium import spaces

from policy_server import cli
from policy_server.commands.check import describe
from tests.servers import serving


def test_check_shows_what_it_agreed_on_and_how_fast_it_is(capsys):
    with serving(client_config={"level": 3}) as server:
        assert cli.main(["check", server.address]) == 0
        chunks = server.collect(timeout_s=0.1)
        ledger = server.ledger()
    out = capsys.readouterr().out
    for expected in (
        rf"address +{server.address}",
        r"handshake +[\d.]+ ms",
        r"round trip +[\d.]+ ms",
        r"protocol +policyserver\.v1, 1\.0",
        r"inference +remote",
        r"observation space +Box float32 \[4\]",
        r"action space +Discrete 2",
        r"client config +level=3",
        r"policy version +1",
        r"action p50 +[\d.]+ ms",
        r"action p99 +[\d.]+ ms",
    ):
        assert re.search(expected, out), expected
    # Nobody learns from it, and it is in nobody's statistics.
    assert chunks == []
    assert ledger["delivered"] == 0


def test_check_waits_for_no_policy(capsys, monkeypatch):
    monkeypatch.setattr("policy_server.commands.check._ACTION_TIMEOUT_S", 0.3)
    with serving(first_version=None) as server:
        assert cli.main(["check", server.address]) == 0
    assert "none yet" in capsys.readouterr().out


def test_wrong_token_is_one_line_and_is_not_shown(capsys, tmp_path):
    token = tmp_path / "token"
    token.write_text("not-the-right-one")
    with serving(token="sesame") as server:
        assert cli.main(["check", server.address, "--token-file", str(token)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "token" in line
        assert "not-the-right-one" not in line
        token.write_text("sesame\n")
        assert cli.main(["check", server.address, "--token-file", str(token)]) == 0


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(0, 255, (84, 84, 3), "uint8"), "Box uint8 [84, 84, 3]"),
        (spaces.Discrete(3, start=-1), "Discrete 3 from -1"),
        (
            spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Tuple([spaces.MultiBinary(2)])}),
            "Dict(a: Discrete 2, b: Tuple(MultiBinary(2)))",
        ),
    ],
)
def test_spaces_are_told_in_a_few_words(space, words):
    assert describe(space) == words
