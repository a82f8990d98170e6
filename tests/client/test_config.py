"""Settings as values: addresses, timeouts, certificates, tokens, and patience."""

import random
from pathlib import Path

import pytest

from client_sdk import AsyncPolicyClient, PolicyClient, Timeouts, TlsConfig
from client_sdk.attempts import Attempts, Backoff
from client_sdk.call_errors import Disconnected
from client_sdk.config import Address, check_token
from client_sdk.endpoint import Endpoint
from client_sdk.errors import InvalidValueError, NotReadyError, UnauthenticatedError
from tests.authority import Authority


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:9900", "localhost", 9900),
        ("http://10.0.0.7:80", "10.0.0.7", 80),
        ("http://trainer.example:9900/", "trainer.example", 9900),
        ("[::1]:9900", "::1", 9900),
        (" trainer:1 ", "trainer", 1),
    ],
)
def test_addresses_are_read(text, host, port):
    assert Address.parse(text) == Address(host, port)
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:", ":9900", "a:b", "a:70000", "a:1/x", "u@a:1", "http://a", None],
)
def test_what_is_no_address_is_refused_with_an_example(text):
    with pytest.raises(InvalidValueError, match="localhost:9900"):
        Address.parse(text)


def test_an_address_that_promises_encryption_is_not_taken_for_plaintext():
    with pytest.raises(InvalidValueError, match="tls=TlsConfig"):
        Address.parse("https://trainer.example:9900")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.3", True), ("::1", True), ("10.0.0.1", False), ("pc", False)],
)
def test_loopback_is_known(host, expected):
    assert Address(host, 1).is_loopback is expected


def test_a_token_leaves_this_machine_only_encrypted_or_when_told_to():
    far, near = Address("trainer", 1), Address("localhost", 1)
    check_token("t", near, tls=None, insecure=False)
    check_token("t", far, tls=TlsConfig(), insecure=False)
    check_token("t", far, tls=None, insecure=True)
    check_token(None, far, tls=None, insecure=False)
    with pytest.raises(InvalidValueError, match="plain text") as caught:
        PolicyClient("trainer:1", token="hidden-word")
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize("mode", ["Remote", ""])
def test_another_inference_mode_is_refused_naming_both(mode):
    with pytest.raises(ValueError, match='expected "remote" or "local"'):
        PolicyClient("localhost:1", inference_mode=mode)


@pytest.mark.parametrize("field", ["connect_s", "action_s", "reconnect_s", "close_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "10", None])
def test_a_timeout_is_a_positive_number(field, value):
    with pytest.raises(InvalidValueError, match=f"Timeouts.{field}"):
        Timeouts(**{field: value})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"inference_mode": ["local"]}, 'expected "remote" or "local", got \\[\'local\'\\]'),
        ({"update_interval": "1"}, "expected a number of seconds from 0 up, or None, got '1'"),
        ({"token": 3}, "expected one word of visible ASCII characters, or None, got int"),
        ({"tls": "ca.pem"}, "expected a TlsConfig or None, got str"),
        ({"insecure": "no"}, "expected True or False, got str"),
        ({"timeouts": 3}, r"expected Timeouts\(...\) or None, got int"),
        ({"observation_space": 3}, "expected Box, .*, got int"),
        ({"cache_dir": 3}, "expected the path of a directory, or None, got int"),
        ({"spool_dir": b"x"}, "expected the path of a directory, or None, got bytes"),
        ({"spool_bytes": "1"}, "expected a positive number of bytes, got '1'"),
        ({"spool_bytes": 1.5}, "expected a positive number of bytes, got 1.5"),
    ],
)
@pytest.mark.parametrize("make", [PolicyClient, AsyncPolicyClient])
def test_an_argument_of_another_type_is_refused_by_name(make, options, expected):
    field = next(iter(options))
    with pytest.raises(InvalidValueError, match=f"^{field}: {expected}"):
        make("localhost:1", **{"inference_mode": "local", **options})


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("root_certificates", {"root_certificates": 3}),
        ("certificate", {"certificate": 3, "key": b""}),
        ("key", {"certificate": b"", "key": 3}),
    ],
)
def test_a_certificate_is_data_or_a_path(field, given):
    expected = rf"TlsConfig\.{field}: expected PEM data or the path of a PEM file, got int"
    with pytest.raises(InvalidValueError, match=expected):
        TlsConfig(**given)


def test_a_timeout_may_be_for_ever():
    assert Timeouts(action_s=float("inf")).action_s == float("inf")


def test_certificates_are_data_or_files_and_never_shown(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = (Path(path) for path in authority.issue("simulator"))
    tls = TlsConfig(authority.file, certificate=certificate.read_text(), key=key.read_bytes())
    assert tls.read("root_certificates") == authority.pem
    assert tls.read("certificate") == certificate.read_bytes()
    assert tls.read("key") == key.read_bytes()
    assert repr(tls) == "TlsConfig()"
    assert "PRIVATE" not in repr(Endpoint(Address("a", 1), tls, "word"))
    assert "word" not in repr(Endpoint(Address("a", 1), tls, "word"))


def test_certificates_that_are_none_are_named_and_no_key_is_shown(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("simulator")
    secret = Path(key).read_text()
    (tmp_path / "other").mkdir()
    other, _ = Authority(tmp_path / "other").issue("simulator")
    for values, said in {
        (
            ("root_certificates", tmp_path / "none.pem"),
        ): "root_certificates: cannot read .*none.pem",
        (("root_certificates", b"nothing"),): "root_certificates: expected a CERTIFICATE",
        (("root_certificates", secret),): "root_certificates: expected a CERTIFICATE",
        (("certificate", certificate),): "both certificate= and key=",
        (("certificate", key), ("key", key)): "certificate: expected a CERTIFICATE.*simulator.key",
        (("certificate", certificate), ("key", b"nothing")): "key: expected a PRIVATE KEY",
        (("certificate", certificate), ("key", certificate)): "key: expected a PRIVATE KEY",
        (("certificate", other), ("key", secret)): "the given data is not the key of .*other",
        (("certificate", certificate), ("key", secret.replace("PRIVATE", "ENCRYPTED PRIVATE"))): (
            "protected by a password"
        ),
        (("certificate", certificate), ("key", secret[:60] + secret[-30:])): "cannot use",
    }.items():
        with pytest.raises(InvalidValueError, match=f"TlsConfig.*{said}") as caught:
            TlsConfig(**dict(values))
        assert secret.splitlines()[1] not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "ümlaut"])
def test_what_cannot_travel_as_a_token_is_refused_without_showing_it(token):
    with pytest.raises(InvalidValueError, match="one word of visible ASCII") as caught:
        PolicyClient("localhost:1", token=token)
    assert not token or token not in str(caught.value)


def test_delays_double_up_to_a_bound_and_are_scattered():
    random.seed(1)
    backoff = Backoff(0.1, 1.0)
    delays = [backoff.delay_s() for _ in range(8)]
    for delay, most in zip(delays, [0.1, 0.2, 0.4, 0.8, 1, 1, 1, 1], strict=True):
        assert most / 2 <= delay <= most
    assert len(set(delays)) == 8


def test_several_attempts_fit_into_a_lease():
    attempts, now, count = Attempts(0.0, 300.0, 10.0, 3.0), 0.0, 0
    while now < 3.0:
        now += attempts.delay_s(now, Disconnected("gone")) or 0.0
        count += 1
    assert count >= 6


def test_attempts_end_with_the_budget_and_leave_time_to_say_why():
    attempts = Attempts(100.0, 10.0, 3.0, None)
    assert attempts.timeout_s(100.0) == 3.0
    assert attempts.timeout_s(108.0) == pytest.approx(0.5)
    assert attempts.delay_s(108.4, Disconnected("gone")) <= 0.1
    assert attempts.delay_s(108.6, Disconnected("gone")) is None
    assert attempts.diagnosis_s == 1.5


def test_only_what_may_change_is_tried_again():
    attempts = Attempts(0.0, 10.0, 3.0, None)
    assert attempts.delay_s(0.0, NotReadyError("no policy yet", "", 0.7)) == 0.7
    assert attempts.delay_s(8.4, NotReadyError("no policy yet", "", 0.7)) is None
    with pytest.raises(UnauthenticatedError):
        attempts.delay_s(0.0, UnauthenticatedError("no"))


def test_who_waits_for_a_server_is_told_so_once_and_not_at_once():
    attempts = Attempts(100.0, 60.0, 10.0, None)
    assert attempts.news(100.5) is None
    assert attempts.news(102.0) == "does not answer yet; trying for another 58 s"
    assert attempts.news(110.0) is None
    assert Attempts(100.0, 60.0, 10.0, 30.0).news(102.0) is None  # has been told otherwise


def test_who_is_not_trusted_is_not_asked_again_unless_a_session_is_to_be_saved():
    distrust = Disconnected("UNAVAILABLE: handshake failed: CERTIFICATE_VERIFY_FAILED: expired")
    assert Attempts(0.0, 60.0, 10.0, None).delay_s(0.0, distrust) is None
    assert Attempts(0.0, 60.0, 10.0, 30.0).delay_s(0.0, distrust) > 0
