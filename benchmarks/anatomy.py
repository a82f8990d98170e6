"""Where the time of one remote action goes, noted in both processes while it happens.

    python -m benchmarks.anatomy

What ``benchmarks.acting`` asks over one stream, with the system-wide clock read between its parts.
A part takes longer here than in a tight loop: whoever has waited for a message finds cold caches.
The echo of the same size, measured in the same run, is what the stream alone takes.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks import echo, report, serving
from benchmarks.acting import request_bytes
from client_sdk import PolicyClient

_ROWS = (1, 64)
_WARM_UP = 50

CLIENT = ("asked", "encoded", "received", "answered")
SERVER = ("taken", "checked", "inferred", "written", "done")
PARTS = {
    "client: check and encode": ("asked", "encoded"),
    "stream: request": ("encoded", "taken"),
    "server: parse and check": ("taken", "checked"),
    "server: inference": ("checked", "inferred"),
    "server: encode": ("inferred", "written"),
    "stream: answer": ("written", "received"),
    "client: decode": ("received", "answered"),
}
"""In a row. 64 rows are recorded while they are checked; a single one is, while its answer travels."""
MEANWHILE = {"server: begins to write, and does the rest": ("written", "done")}


# -- the server's process --------------------------------------------------------------------------


def serve(path: Path) -> None:
    """``benchmarks.serving``, noting the times of each request: see ``SERVER``."""
    from policy_server.act_stream import ActStream
    from policy_server.lockstep import Lockstep
    from policy_server.onnx_engine.factory import OnnxEnginePolicy

    times: list[list[int]] = []
    take, infer, answer = ActStream._take, OnnxEnginePolicy.infer, Lockstep.answer

    def timed_take(self: ActStream, data: bytes) -> Any:
        times.append([perf_counter_ns()])
        ask = take(self, data)
        times[-1].append(perf_counter_ns())
        return ask

    def timed_infer(self: OnnxEnginePolicy, *arguments: Any) -> Any:
        times[-1].append(perf_counter_ns())
        batch = infer(self, *arguments)
        times[-1].append(perf_counter_ns())
        return batch

    def timed_answer(self: Lockstep, *arguments: Any) -> None:
        times[-1].append(perf_counter_ns())
        answer(self, *arguments)

    ActStream._take = timed_take  # type: ignore[method-assign]
    OnnxEnginePolicy.infer = timed_infer  # type: ignore[method-assign]
    Lockstep.answer = timed_answer  # type: ignore[method-assign]
    serving._serve(64, 2.0, versions=False)
    path.write_text(json.dumps(times))


# -- the client ------------------------------------------------------------------------------------


@contextlib.contextmanager
def noting(client: PolicyClient) -> Iterator[list[int]]:
    """Within, the list gets the times at which the client sends and has received."""
    times: list[int] = []
    stream = client._actor._stream  # type: ignore[attr-defined]
    send, receive = stream.send, type(stream).receive

    def timed_send(data: bytes) -> None:
        times.append(perf_counter_ns())
        send(data)

    def timed_receive(self: Any, timeout_s: float) -> bytes:
        data: bytes = receive(self, timeout_s)
        times.append(perf_counter_ns())
        return data

    stream.send = timed_send
    type(stream).receive = timed_receive
    try:
        yield times
    finally:
        stream.send = send
        type(stream).receive = receive


def ask(client: PolicyClient, rows: int, messages: int) -> list[list[int]]:
    """``[messages, 4]`` times on the client's side: see ``PARTS``."""
    found = []
    with contextlib.ExitStack() as stack:
        act = _one(client, stack) if rows == 1 else _many(client, rows, stack)
        for _ in range(_WARM_UP):
            act()
        with noting(client) as times:
            for _ in range(messages):
                times.clear()
                start = perf_counter_ns()
                act()
                found.append([start, *times, perf_counter_ns()])
    return found


def _one(client: PolicyClient, stack: contextlib.ExitStack) -> Callable[[], Any]:
    episode = stack.enter_context(client.episode())
    observation = np.zeros(4, np.float32)
    episode.act(observation)
    return lambda: episode.act(observation, 1.0)


def _many(client: PolicyClient, rows: int, stack: contextlib.ExitStack) -> Callable[[], Any]:
    batch = stack.enter_context(client.episodes(rows))
    observations, rewards = np.zeros((rows, 4), np.float32), np.ones(rows)
    never = np.zeros(rows, np.bool_)
    return lambda: batch.act(observations, rewards, never, never)


# -- both ------------------------------------------------------------------------------------------


def parts(asked: list[list[int]], served: list[list[int]]) -> dict[str, float]:
    """Median microseconds of each part, and of the whole."""
    spans: dict[str, list[float]] = {name: [] for name in (*PARTS, "all of it", *MEANWHILE)}
    for client_times in asked:
        at = dict(zip(CLIENT, client_times, strict=True))
        within = [
            times
            for times in served
            if len(times) == len(SERVER) and at["encoded"] < times[0] < at["received"]
        ]
        if len(within) != 1:
            raise RuntimeError(f"expected one request at that time, found {len(within)}")
        at |= zip(SERVER, within[0], strict=True)
        for name, (start, end) in (PARTS | MEANWHILE).items():
            spans[name].append(at[end] - at[start])
        spans["all of it"].append(at["answered"] - at["asked"])
    return {name: statistics.median(each) / 1e3 for name, each in spans.items()}


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--messages", type=int, default=3000, help="of each size")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for rows in _ROWS:
        with tempfile.TemporaryDirectory() as directory, echo.EchoProcess() as peer:
            path = Path(directory) / "times.json"
            command = ("benchmarks.anatomy", "--serve", str(path))
            with serving.ServerProcess(command=command) as server:
                with PolicyClient(server.address) as client:
                    asked = ask(client, rows, options.messages)
                    rate = echo.blocking(
                        peer.address, request_bytes(client, rows), options.messages
                    )
                server.stop()
            found = parts(asked, json.loads(path.read_text()))
        results[str(rows)] = {**found, "echo of that size": 1e6 / rate}
    report.print_table(
        "Microseconds of one message, medians",
        [
            {"part": name, **{f"rows: {rows}": f"{results[str(rows)][name]:.0f}" for rows in _ROWS}}
            for name in results["1"]
        ],
    )
    report.write_json(options.results, "anatomy", {"microseconds": results})


if __name__ == "__main__":
    main()
