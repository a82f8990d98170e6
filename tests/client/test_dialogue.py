"""A call whose caller reads its answers himself: every way in which it can go on, and end."""

import contextlib
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from concurrent import futures

import grpc
import pytest
from grpc._cython import cygrpc

from client_sdk.call_errors import Disconnected, Overdue
from client_sdk.channel import Channel, Stream
from client_sdk.config import Address
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.errors import (
    IncompatibleProtocolError,
    LimitExceededError,
    UnauthenticatedError,
)
from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason

SERVICE = "test.Talk"
PATIENCE_S = 20.0
OVER_AND_OUT = b"over and out"


class Talk:
    """What a server does with requests, by the name of the rpc.

    Attributes:
        ended: Set once a call is over.
        noted: What was said to ``notes``.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.noted = queue.SimpleQueue()

    def echo(self, requests, context):
        yield from requests

    def token(self, requests, context):
        for _ in requests:
            yield dict(context.invocation_metadata())["authorization"].encode()

    def once(self, requests, context):
        yield next(requests)

    def none(self, requests, context):
        next(requests)
        yield from ()

    def silent(self, requests, context):
        context.add_callback(self.ended.set)
        for data in requests:
            if data == OVER_AND_OUT:
                self.ended.wait(PATIENCE_S)
            yield data

    def notes(self, requests, context):
        for data in requests:
            self.noted.put(data)
            yield data

    def deaf(self, requests, context):
        context.add_callback(self.ended.set)
        self.ended.wait(PATIENCE_S)
        yield from ()

    def refuse(self, requests, context):
        yield next(requests)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")

    def fault(self, requests, context):
        fault = Fault(Reason.LIMIT_EXCEEDED, "too many")
        detail = fault.to_detail().SerializeToString()
        context.set_trailing_metadata(((ERROR_TRAILER, detail),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")

    def fail(self, requests, context):
        raise RuntimeError("a bug")


@contextlib.contextmanager
def talking(talk=None):
    talk = talk or Talk()
    names = ["echo", "token", "once", "none", "silent", "notes", "deaf", "refuse", "fault", "fail"]
    handlers = {name: grpc.stream_stream_rpc_method_handler(getattr(talk, name)) for name in names}
    server = grpc.server(
        futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)]
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield address
    finally:
        talk.ended.set()
        server.stop(0.0).wait(PATIENCE_S)


@contextlib.contextmanager
def dialogue_with(address, name, **settings):
    channel = Channel(Endpoint(Address.parse(address), **settings), SERVICE)
    dialogue = channel.dialogue(name)
    try:
        yield dialogue
    finally:
        dialogue.close()
        channel.close()


@contextlib.contextmanager
def dialogue(name, talk=None, **settings):
    with talking(talk) as address, dialogue_with(address, name, **settings) as made:
        assert isinstance(made, Dialogue)  # this gRPC offers what it needs
        yield made


def ends_as(dialogue, error, match):
    """Now and whenever it is asked again."""
    for _ in range(3):
        with pytest.raises(error, match=match):
            dialogue.ask(OVER_AND_OUT, PATIENCE_S)


def test_each_request_is_answered_whatever_its_size():
    with dialogue("echo") as talk:
        for size in (0, 1, 70_000, 20_000_000, 3):
            data = bytes(range(256)) * (size // 256) + b"." * (size % 256)
            assert talk.ask(data, PATIENCE_S) == data


def test_no_thread_receives_for_it():
    with talking() as address:
        before = threading.active_count()
        with dialogue_with(address, "echo") as talk:
            talk.ask(b"1", PATIENCE_S)
            # One more watches the clock; the server, which is in this process, needs one too.
            assert threading.active_count() <= before + 2
            names = {thread.name for thread in threading.enumerate()}
        assert "client_sdk reader" not in names


def test_metadata_goes_along():
    with dialogue("token", token="secret") as talk:
        assert talk.ask(b"", PATIENCE_S) == b"Bearer secret"


@pytest.mark.parametrize(
    ("name", "answers", "error", "match"),
    [
        ("once", 1, Disconnected, "the server ended the stream"),
        ("none", 0, Disconnected, "the server ended the stream"),
        ("refuse", 1, UnauthenticatedError, "wrong token"),
        ("fault", 0, LimitExceededError, "^too many$"),
        ("fail", 0, Disconnected, "a bug"),
    ],
)
def test_the_end_is_told_with_its_reason(name, answers, error, match):
    with dialogue(name) as talk:
        for _ in range(answers):
            assert talk.ask(b"!", PATIENCE_S) == b"!"
        ends_as(talk, error, match)


def test_what_is_not_offered_is_told_so():
    with (
        talking() as address,
        dialogue_with(address, "sing") as talk,
        pytest.raises(IncompatibleProtocolError, match="does not offer this service"),
    ):
        talk.ask(b"", PATIENCE_S)


def test_nobody_there_is_a_loss():
    with dialogue_with("127.0.0.1:1", "echo") as talk:
        ends_as(talk, Disconnected, "UNAVAILABLE")


def test_a_server_that_stops_is_a_loss():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        address = server.enter_context(talking())
        talk = stack.enter_context(dialogue_with(address, "echo"))
        assert talk.ask(b"1", PATIENCE_S) == b"1"
        server.close()
        ends_as(talk, Disconnected, "CANCELLED|UNAVAILABLE")


def test_an_answer_that_comes_too_late_ends_the_call_on_both_sides():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        assert asked.ask(b"1", 0.3) == b"1"
        threading.Event().wait(0.8)  # the clock runs for answers only
        assert asked.ask(b"2", 5.0) == b"2"
        talk.ended.clear()
        for _ in range(2):
            with pytest.raises(Overdue):
                asked.ask(OVER_AND_OUT, 0.3)
        assert talk.ended.wait(PATIENCE_S)


def test_closing_ends_the_call_and_everything_after_it():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        assert asked.ask(b"1", PATIENCE_S) == b"1"
        asked.close()
        assert talk.ended.wait(PATIENCE_S)
        asked.close()
        ends_as(asked, Disconnected, "given up")


def test_closing_does_not_need_a_question_or_a_server():
    with dialogue("echo"):
        pass
    with dialogue_with("127.0.0.1:1", "echo"):
        pass


def test_what_was_sent_is_answered_in_order():
    with dialogue("echo") as talk:
        for number in range(5):
            talk.send(b"%d" % number)
        talk.flush(PATIENCE_S)
        talk.send(b"5")  # goes with the next receive
        assert [talk.receive(PATIENCE_S) for _ in range(6)] == [b"%d" % n for n in range(6)]


def test_flushing_what_is_not_there_sends_nothing():
    with dialogue("echo") as talk:
        talk.flush(PATIENCE_S)
        talk.send(b"1")
        talk.flush(PATIENCE_S)
        talk.flush(PATIENCE_S)
        assert talk.receive(PATIENCE_S) == b"1"
        with pytest.raises(Overdue):
            talk.receive(0.3)


def test_what_was_flushed_arrives_though_nobody_receives():
    talk = Talk()
    with dialogue("notes", talk) as told:
        for number in range(300):
            told.send(b"%d" % number)
            told.flush(PATIENCE_S)
        noted = [talk.noted.get(timeout=PATIENCE_S) for _ in range(300)]
        assert noted == [b"%d" % number for number in range(300)]


def test_what_a_server_does_not_read_is_given_up_in_time():
    talk = Talk()
    with dialogue("deaf", talk) as told:
        start = time.monotonic()
        for _ in range(2):  # more than fits on the way
            told.send(bytes(20_000_000))
            told.flush(0.5)
        with pytest.raises(Overdue):
            told.receive(PATIENCE_S)
        assert time.monotonic() - start < 5.0


def test_a_shorter_patience_after_a_longer_one_is_kept():
    with dialogue("silent") as talk:
        for patience_s in (100.0, PATIENCE_S):
            assert talk.ask(b"1", patience_s) == b"1"
        talk.send(OVER_AND_OUT)
        start = time.monotonic()
        with pytest.raises(Overdue):
            talk.receive(0.3)
        assert 0.3 <= time.monotonic() - start < 5.0


def test_giving_up_from_another_thread_wakes_whoever_receives():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        assert asked.ask(b"1", PATIENCE_S) == b"1"
        talk.ended.clear()
        asked.send(OVER_AND_OUT)
        asked.flush(PATIENCE_S)
        threading.Timer(0.2, asked.give_up).start()
        start = time.monotonic()
        with pytest.raises(Disconnected, match="given up"):
            asked.receive(PATIENCE_S)
        assert time.monotonic() - start < 5.0
        assert talk.ended.wait(PATIENCE_S)
        ends_as(asked, Disconnected, "given up")
        asked.close()
        assert asked._unfinished == 0


def test_giving_up_needs_nobody_who_waits():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        assert asked.ask(b"1", PATIENCE_S) == b"1"
        asked.give_up()
        assert talk.ended.wait(PATIENCE_S)
        asked.give_up()
        ends_as(asked, Disconnected, "given up")
        asked.close()
        assert asked._unfinished == 0


def test_a_signal_handler_may_close_it_under_a_question():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        asked.ask(b"1", PATIENCE_S)
        before = signal.signal(signal.SIGALRM, lambda *_: asked.close())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            ends_as(asked, Disconnected, "given up")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert talk.ended.wait(PATIENCE_S)


class Closing(Dialogue):
    """Is closed by a signal handler just when an answer is there."""

    def _next(self):
        answer = super()._next()
        self.close()
        return answer


class ClosingBefore(Dialogue):
    """Is closed by a signal handler just when it begins to wait."""

    def _next(self):
        if not self._closed:
            self.close()
        return super()._next()


@pytest.mark.parametrize("closing", [Closing, ClosingBefore])
def test_closed_under_a_question_it_leaves_nothing_behind(monkeypatch, closing):
    monkeypatch.setattr("client_sdk.channel.Dialogue", closing)
    with dialogue("echo") as asked:
        ends_as(asked, Disconnected, "given up")
        assert asked._unfinished == 0


def test_an_interrupt_ends_the_call():
    talk = Talk()
    with dialogue("silent", talk) as asked:
        asked.ask(b"1", PATIENCE_S)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                asked.ask(OVER_AND_OUT, PATIENCE_S)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert talk.ended.wait(PATIENCE_S)
        ends_as(asked, Disconnected, "given up")


INTERRUPTS = """
    import random, signal, sys
    from client_sdk.call_errors import Disconnected
    from client_sdk.channel import Channel
    from client_sdk.config import Address
    from client_sdk.endpoint import Endpoint

    address, service, rounds = *sys.argv[1:3], int(sys.argv[3])
    random.seed(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(rounds):
        channel = Channel(Endpoint(Address.parse(address)), service)
        talk = channel.dialogue("echo")
        talk.ask(b"1", 20.0)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 5e-3))
                while True:
                    talk.ask(b"2", 20.0)
            finally:
                talk.close()
        except KeyboardInterrupt:
            talk.close()
        channel.close()
    print("rounds", rounds)
"""


def test_interrupts_may_strike_anywhere():
    with talking() as address:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(INTERRUPTS), address, SERVICE, "200"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "rounds 200\n"), done.stderr


# -- where gRPC does not offer what it needs


@pytest.mark.parametrize("setting", ["1", "true", "0"])
def test_where_grpc_survives_forks_its_own_threads_receive(monkeypatch, setting):
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", setting)
    with talking() as address, dialogue_with(address, "echo") as talk:
        assert isinstance(talk, Dialogue if setting == "0" else Stream)
        assert talk.ask(b"1", PATIENCE_S) == b"1"


def without_operations():
    names = [name for name in vars(cygrpc) if "Operation" not in name]
    return types.SimpleNamespace(**{name: getattr(cygrpc, name) for name in names})


def with_other_arguments():
    changed = types.SimpleNamespace(**vars(cygrpc))
    changed.SendInitialMetadataOperation = lambda *, metadata: metadata
    return changed


@pytest.mark.parametrize("change", [without_operations, with_other_arguments])
def test_a_grpc_that_has_changed_inside_is_called_the_usual_way(monkeypatch, change):
    monkeypatch.setattr("client_sdk.dialogue.cygrpc", change())
    with talking() as address, dialogue_with(address, "silent") as talk:
        assert isinstance(talk, Stream)
        assert talk.ask(b"1", PATIENCE_S) == b"1"
        with pytest.raises(Overdue):
            talk.ask(OVER_AND_OUT, 0.3)
