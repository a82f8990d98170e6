"""Signals end the process in time, whatever it is doing."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

# Each says "ready" when the signal may come.
WAITS = """
import sys, threading
from policy_server.commands.ending import Ending
with Ending() as ending:
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        print("cleaned up", flush=True)
sys.exit(ending.exit_code)
"""
# As slow as an interpreter with much to tear down.
ENDS_SLOWLY = """
import atexit, threading
from policy_server.commands.ending import Ending
atexit.register(threading.Event().wait, 60)
with Ending(grace_s=60) as ending:
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        print("cleaned up")
ending.leave(ending.exit_code)
"""
# Native code that lets other threads run, but takes minutes to come back to the interpreter.
STUCK = """
import hashlib
from policy_server.commands.ending import Ending
def stuck():
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10**9)
with Ending(grace_s=0.5):
    try:
        print("ready", flush=True)
        stuck()
    except KeyboardInterrupt:  # it came just before
        stuck()
"""
CLEANS_FOR_EVER = """
import threading
from policy_server.commands.ending import Ending
with Ending(grace_s=0.5):
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        threading.Event().wait(60)
"""

# Whatever Ray makes of the signals meanwhile, and however long it stays in native code.
AT_ONCE = """
import hashlib, signal, sys
from policy_server.commands.ending import Ending
def theirs(number, frame):
    sys.exit(9)
with Ending() as ending:
    try:
        with ending.at_once():
            signal.signal(signal.SIGTERM, theirs)
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10**9)
    finally:
        print("torn apart", flush=True)
"""
# A child that ignores the signal, and a child of its own.
FAMILY = """
import subprocess, sys
from policy_server.commands.ending import Ending
CHILD = '''
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "60"])
print("ready", flush=True)
grandchild.wait()
'''
with Ending() as ending, ending.at_once():
    subprocess.run([sys.executable, "-c", CHILD])
"""
ENDS_FOR_EVER = """
import atexit, threading
from policy_server.commands.ending import Ending
atexit.register(threading.Event().wait, 60)
with Ending(grace_s=0.5):
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        pass
"""
AFTERWARDS = """
import signal, sys, threading
from policy_server.commands.ending import Ending
with Ending() as ending:
    with ending.at_once():
        pass
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    except KeyboardInterrupt:
        print("cleaned up", flush=True)
sys.exit(ending.exit_code)
"""


def run(code, number, times=1):
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            began = time.monotonic()
            for _ in range(times):
                process.send_signal(number)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        return process.returncode, out, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_the_process_clean_up(number):
    code, out, _ = run(WAITS, number)
    assert out == "cleaned up\n"
    assert code == 128 + number


def test_the_end_of_the_interpreter_is_not_waited_for():
    code, out, _ = run(ENDS_SLOWLY, signal.SIGTERM)
    assert (code, out) == (143, "cleaned up\n")


def test_second_signal_does_not_disturb_the_cleaning_up():
    code, out, _ = run(WAITS, signal.SIGINT, times=3)
    assert out == "cleaned up\n"
    assert code == 130


def test_nothing_that_it_started_stays_when_it_is_ended():
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        process.terminate()
        assert process.wait(20) == 143
        assert not psutil.wait_procs(family, timeout=5)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_at_once_what_must_not_be_torn_apart(number):
    code, out, elapsed_s = run(AT_ONCE, number)
    assert out == f"stopped by {number.name}\n"
    assert code == 128 + number
    assert elapsed_s < 2


def test_after_that_a_signal_lets_the_process_clean_up_again():
    code, out, _ = run(AFTERWARDS, signal.SIGTERM)
    assert out == "cleaned up\n"
    assert code == 143


@pytest.mark.parametrize("code", [STUCK, CLEANS_FOR_EVER, ENDS_FOR_EVER])
def test_process_that_does_not_react_is_ended(code):
    status, _, elapsed_s = run(code, signal.SIGTERM)
    assert status == 143
    assert elapsed_s < 5
