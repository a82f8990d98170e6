"""``policy-client watch``: look at an environment that a host runs, or record it. Main thread only."""

from __future__ import annotations

import argparse
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk import credentials
from client_sdk.call_errors import Disconnected
from client_sdk.config import Address, check_token
from client_sdk.diagnosis import diagnose
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.errors import InvalidValueError, PolicyClientError, error_from_fault
from client_sdk.option_types import EXIT_USAGE, number, positive_seconds, whole_number
from client_sdk.video import VideoFile
from client_sdk.viewer import Viewer
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault
from client_sdk.wire.tensors import tensor_from_proto

logger = logging.getLogger(__name__)

EXIT_FAILED = 1

_T = TypeVar("_T")
_Frame: TypeAlias = NDArray[np.uint8]
_Show: TypeAlias = Callable[[_Frame], bool]
"""Shows a frame; whether anybody wants another."""

_SILENT_S = 1.0
"""Without a frame for so long, a person wants to know what is waited for."""

_EXAMPLES = """\
examples:
  policy-client host CartPole-v1 --kwargs '{"render_mode": "rgb_array"}'
  policy-client watch localhost:9901
  policy-client watch localhost:9901 --out run.mp4 --seconds 20
"""


def add_parser(commands: Any, epilog: str) -> None:
    """Add the command to a program's."""
    watch = commands.add_parser(
        "watch",
        help="look at an environment that a host runs, or record it",
        description="Show the frames of an environment that a host runs while somebody else steps "
        "it; or record them. What it steps must be rendered as rgb_array.",
        epilog=f"{_EXAMPLES}\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("address", metavar="HOST:PORT", help="the host of environments")
    watch.add_argument("--out", type=Path, metavar="FILE.mp4", help="record, instead of showing")
    watch.add_argument(
        "--fps",
        type=number(0.1, 1000),
        default=30.0,
        metavar="N",
        help="frames per second (default: 30)",
    )
    watch.add_argument(
        "--seconds",
        type=positive_seconds,
        metavar="S",
        help="end after S seconds (default: at Ctrl-C, with the host, or when the window is closed)",
    )
    watch.add_argument(
        "--index",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="I",
        help="which of an environment's copies that step together (default: 0)",
    )
    credentials.add_client_options(watch)
    watch.add_argument("--debug", action="store_true", help="log in detail")
    watch.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Watch until the time is over, the host ends, the window is closed, or a signal comes.

    Returns:
        The exit code.
    """
    try:
        address = Address.parse(options.address)
        token, tls = credentials.token(options), credentials.client_tls(options)
        check_token(token, address, tls=tls, insecure=bool(options.insecure))
        endpoint = Endpoint(address, tls, token, peer="host of environments")
        show, finish = _sink(options, address)
    except InvalidValueError as error:
        return _failed(EXIT_USAGE, str(error))
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        return _failed(EXIT_FAILED, str(error))
    what = "waiting at %s for somebody to step an environment that is rendered"
    silence = threading.Timer(_SILENT_S, logger.info, (what, address))
    silence.start()
    seen = 0
    try:
        try:
            with contextlib.closing(_frames(endpoint, options)) as frames:
                for seen, frame in enumerate(frames, start=1):
                    silence.cancel()
                    if not show(frame):
                        break
                    if seen == 1:
                        target = f"; recording to {options.out}" if options.out else ""
                        print(f"watching {address}{target}", flush=True)
        finally:
            silence.cancel()
            finish()
    except PolicyClientError as error:
        return _failed(EXIT_FAILED, str(error))
    except OSError as error:
        return _failed(EXIT_FAILED, f"cannot write {options.out}: {error}")
    if seen:
        return 0
    unwritten = f"; {options.out} is not written" if options.out else ""
    return _failed(EXIT_FAILED, f"no frame came{unwritten}")


def _sink(options: argparse.Namespace, address: Address) -> tuple[_Show, Callable[[], None]]:
    """Where frames go, and what ends it."""
    if options.out is None:
        viewer = Viewer(address)

        def show(frame: _Frame) -> bool:
            viewer.show(frame, options.fps)
            return not viewer.dismissed

        return show, viewer.close
    video = VideoFile(options.out, options.fps)

    def add(frame: _Frame) -> bool:
        video.add(frame)
        return True

    def finish() -> None:
        video.close()
        if video.frames:
            print(f"wrote {video.frames} frames to {options.out}", flush=True)

    return add, finish


def _frames(endpoint: Endpoint, options: argparse.Namespace) -> Generator[_Frame]:
    """Frames of whichever environment the host runs, until the time is over or the host ends."""
    request = pb.StreamFramesRequest(env_index=options.index, max_frames_per_second=options.fps)
    connection = EnvConnection(endpoint)
    start, seen = time.monotonic(), 0
    try:
        for response in _read_aside(connection.stream_frames(request, options.seconds)):
            seen += 1
            yield np.asarray(tensor_from_proto(response.frame, "frame"))
        logger.info("the host is gone (it ended the stream)")
    except Disconnected as error:
        waited_s = time.monotonic() - start
        if options.seconds is not None and waited_s >= options.seconds:
            return
        if not seen:
            raise diagnose(endpoint, waited_s, error.why, 1.5) from None
        logger.info("the host is gone (%s)", error.why)
    except Fault as fault:
        raise error_from_fault(fault) from None
    finally:
        connection.disconnect()


def _read_aside(responses: Iterator[_T]) -> Generator[_T]:
    """The same, read by another thread: gRPC's own blocking reads do not bear Ctrl-C."""
    inbox: queue.SimpleQueue[_T | Exception | None] = queue.SimpleQueue()
    room = threading.Semaphore()  # else the frames of a slow encoder would pile up here

    def read() -> None:
        try:
            for response in responses:
                inbox.put(response)
                room.acquire()
            inbox.put(None)
        except Exception as error:  # raised where it is waited for
            inbox.put(error)

    threading.Thread(target=read, name="frames", daemon=True).start()
    try:
        while (item := inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            room.release()
    finally:
        room.release()


def _failed(code: int, message: str) -> int:
    print(f"policy-client: {' '.join(message.split())}", file=sys.stderr)
    return code
