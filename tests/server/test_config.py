"""PolicyServerConfig: what it refuses, and how it travels."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import pytest

from client_sdk.config import is_loopback
from policy_server import PolicyServerConfig, ServerTls
from policy_server.config import ENV_CONFIG_KEY
from tests.authority import Authority

SECONDS = ("hold_timeout_s", "wait_timeout_s", "sample_wait_s", "lease_s", "keepalive_s")
RATES = ("max_steps_per_second_per_session", "max_sessions_opened_per_second")
COUNTS = (
    "max_sessions",
    "max_open_episodes_per_session",
    "max_open_episodes",
    "max_rows_per_request",
    "max_calls_per_session",
    "max_message_bytes",
    "policies_kept",
    "policies_remembered",
)
BAD_VALUES = {
    "port": [-1, 65536, "9900", 1.5, None],
    "host": [7, ""],
    "while_learning": ["maybe", None],
    "when_full": ["drop", True],
    "awaits_checkpoint": [1, "yes", None],
    "insecure": [1, "no", None],
    "tls": ["cert.pem", 3, {"cert": "a", "key": "b"}, {"certificate": "a"}],
    "max_policy_lag": [-1, "many", 1.5],
    "buffer_fragments": [0.5, math.nan, math.inf, "2"],
    "drain_s": [-1.0, math.nan, math.inf],
    "steps_per_upload": [0, -1, 1.5, "many", None],
    "client_config": [{"f": object()}, {"f": {1, 2}}, {1: 2}, [1, 2], {"f": math.nan}],
    "token": ["", "with space ", "new\nline", "ümlaut", 7],
    "address_file": [7],
    **{field: [0, -1.0, math.nan, math.inf, "5", None] for field in SECONDS},
    **{field: [0, -1.0, math.nan, math.inf, "5", True, None] for field in RATES},
    **{field: [0, -1, 1.5, "5", None] for field in COUNTS},
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_VALUES.items() for value in values]
)
def test_value_out_of_range_is_refused_naming_the_field(field, value):
    with pytest.raises(ValueError, match=rf"PolicyServerConfig\.{field}\b.*expected") as caught:
        PolicyServerConfig(**{field: value})
    if field in {"token", "tls"}:
        assert str(caught.value).endswith(f"got {type(value).__name__}")
    else:
        assert str(caught.value).endswith(f"got {value!r}")


def test_every_field_has_a_bad_value():
    assert {field.name for field in dataclasses.fields(PolicyServerConfig)} == set(BAD_VALUES)


def test_certificates_are_paths():
    with pytest.raises(ValueError, match=r"ServerTls\.certificate: expected PEM data .*, got int"):
        PolicyServerConfig(tls=ServerTls(3, "key.pem"))


def test_unknown_key_is_refused_by_name_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown key 'prot'.*known keys:.*port"):
        PolicyServerConfig.from_env_config({ENV_CONFIG_KEY: {"prot": 9900}})


def test_nothing_set_gives_the_defaults():
    assert PolicyServerConfig.from_env_config({}) == PolicyServerConfig()
    assert PolicyServerConfig.from_env_config({"level": 3}) == PolicyServerConfig()


@pytest.fixture
def certificates(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("trainer")
    return {"certificate": certificate, "key": key, "client_ca": authority.file}


def test_configuration_survives_the_env_config_and_json_and_pickle(certificates):
    config = PolicyServerConfig(
        host="0.0.0.0",
        port=0,
        token="secret",
        tls=ServerTls(**certificates),
        while_learning="serve",
        max_policy_lag=None,
        client_config={"level": 3, "names": ["a"], "deep": {"flag": True, "none": None}},
    )
    env_config = {"mine": 1, **config.to_env_config()}
    assert PolicyServerConfig.from_env_config(env_config) == config
    assert PolicyServerConfig.from_env_config(json.loads(json.dumps(env_config))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_token_is_in_no_repr():
    assert "secret" not in repr(PolicyServerConfig(token="secret"))
    assert "secret" not in str(PolicyServerConfig(token="secret"))


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyServerConfig().port = 1


@pytest.mark.parametrize("missing", ["certificate", "key", "client_ca"])
def test_missing_certificate_file_is_named(certificates, missing):
    tls = ServerTls(**{**certificates, missing: "/nowhere/at/all.pem"})
    with pytest.raises(
        ValueError, match=rf"ServerTls.{missing}: cannot read '/nowhere/at/all.pem'"
    ):
        PolicyServerConfig(tls=tls)


def test_key_of_another_certificate_is_refused_naming_both(certificates, tmp_path):
    (tmp_path / "other").mkdir()
    _, key = Authority(tmp_path / "other").issue("trainer")
    with pytest.raises(ValueError, match=r"other/trainer.key' is not the key of .*trainer.pem'"):
        PolicyServerConfig(tls=ServerTls(**{**certificates, "key": key}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "[::]"])
def test_listening_beyond_loopback_needs_tls_and_a_token(certificates, host):
    tls = ServerTls(**certificates)
    for settings in ({}, {"token": "secret"}, {"tls": tls}):
        with pytest.raises(ValueError, match=r"without TLS and a token.*insecure=True"):
            PolicyServerConfig(host=host, **settings)
    for settings in ({"token": "secret", "tls": tls}, {"insecure": True}):
        assert PolicyServerConfig(host=host, **settings).host == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"])
def test_loopback_needs_neither(host):
    assert is_loopback(host)
    assert PolicyServerConfig(host=host).host == host
