"""Packed numbers against bytes for the columns of ``StepRows``: which is cheaper for us?

The contract carries episodes, steps and rewards as packed repeated fields, which any protobuf
client can read. The alternative is one ``bytes`` field per column, read as an array. Measured are
serializing from lists, and parsing back to lists, in one thread; the best of several repeats, for
the question is what each must cost. Run: ``python -m benchmarks.wire_columns``.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from benchmarks import report
from client_sdk.wire import policyserver_pb2 as pb

ROWS = (1, 64, 256)
COLUMNS = (("episodes", "<u8"), ("steps", "<u8"), ("rewards", "<f8"))


def bytes_message() -> Any:
    """A message class with one bytes field per column."""
    file = descriptor_pb2.FileDescriptorProto(
        name="bytes_rows.proto", package="benchmark", syntax="proto3"
    )
    message = file.message_type.add(name="BytesRows")
    for number, (name, _) in enumerate(COLUMNS, start=1):
        message.field.add(
            name=name,
            number=number,
            type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmark.BytesRows"))


BytesRows = bytes_message()


def encode_packed(columns: dict[str, list[Any]]) -> bytes:
    rows = pb.StepRows()
    rows.episodes.extend(columns["episodes"])
    rows.steps.extend(columns["steps"])
    rows.rewards.extend(columns["rewards"])
    return rows.SerializeToString()


def decode_packed(message: bytes) -> dict[str, list[Any]]:
    rows = pb.StepRows.FromString(message)
    return {
        "episodes": list(rows.episodes),
        "steps": list(rows.steps),
        "rewards": list(rows.rewards),
    }


def encode_bytes(columns: dict[str, list[Any]]) -> bytes:
    rows = BytesRows()
    rows.episodes = np.array(columns["episodes"], "<u8").tobytes()
    rows.steps = np.array(columns["steps"], "<u8").tobytes()
    rows.rewards = np.array(columns["rewards"], "<f8").tobytes()
    return bytes(rows.SerializeToString())


def decode_bytes(message: bytes) -> dict[str, list[Any]]:
    rows = BytesRows.FromString(message)
    return {
        "episodes": np.frombuffer(rows.episodes, "<u8").tolist(),
        "steps": np.frombuffer(rows.steps, "<u8").tolist(),
        "rewards": np.frombuffer(rows.rewards, "<f8").tolist(),
    }


def best_us(call: Callable[[], Any], repeats: int) -> float:
    timer = timeit.Timer(call)
    number = max(1, timer.autorange()[0] // 10)
    return min(timer.repeat(repeats, number)) / number * 1e6


def main() -> None:
    parser = report.arguments("Packed numbers against bytes, in microseconds.")
    parser.add_argument("--repeats", type=int, default=15, help="the best of so many is told")
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    for n in ROWS:
        columns = {
            "episodes": list(range(1000, 1000 + n)),
            "steps": [37 * index % 500 for index in range(n)],
            "rewards": [1.0 + index / 7 for index in range(n)],
        }
        for form, encode, decode in (
            ("packed", encode_packed, decode_packed),
            ("bytes", encode_bytes, decode_bytes),
        ):
            message = encode(columns)
            if decode(message) != columns:
                raise RuntimeError(f"{form}: what came back is not what was sent")
            encode_us = best_us(functools.partial(encode, columns), options.repeats)
            decode_us = best_us(functools.partial(decode, message), options.repeats)
            table.append(
                {
                    "rows": n,
                    "form": form,
                    "encode us": round(encode_us, 2),
                    "decode us": round(decode_us, 2),
                    "both us": round(encode_us + decode_us, 2),
                    "size B": len(message),
                }
            )
    report.print_table("Numbers of rows on the wire", table)
    report.write_json(options.results, "wire_columns", {"results": table})


if __name__ == "__main__":
    main()
