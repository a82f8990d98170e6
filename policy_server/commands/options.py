"""The options of ``policy-server`` and what ``--help`` says of them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from client_sdk import credentials
from client_sdk.option_types import (
    Parser,
    finite_number,
    json_object,
    positive_seconds,
    whole_number,
)
from policy_server.commands.comparison import WAYS
from policy_server.commands.training_config import ALGORITHMS
from policy_server.config import PolicyServerConfig

_EXIT_CODES = """\
exit codes:
  0    the goal was reached, or what was asked for is there
  1    training failed, no policy server answers, or the policy cannot be exported
  2    a bad option
  3    a dependency is missing or of another version
  4    the port is in use
  130  ended by Ctrl-C (SIGINT)
  143  ended by SIGTERM
"""

_TRAIN_EXAMPLES = """\
examples:
  policy-server train --env CartPole-v1 --stop-return 450 --checkpoint-dir runs/cartpole
  policy-server train --env CartPole-v1 --stop-return 450 --checkpoint-dir runs/cartpole --resume
  policy-server train --spaces robot.json --algo DQN --port 9900 --set lr=0.0005
  policy-server train --config my_project.training:make_config --num-env-runners 0

Simulators connect with client_sdk.PolicyClient, or for a Gymnasium environment with
  policy-client run CartPole-v1 --server localhost:9900 --envs 8
"""


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a word needs no quotes


def build_parser(run: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        run: What each command does; ends up in ``run`` of the parsed options.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="policy-server",
        description="Train RLlib policies from simulators that drive their own loop.",
        epilog=_EXIT_CODES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="serve a policy to simulators and train it from what they experience",
        description="Serve a policy to simulators and train it from what they experience.",
        epilog=f"{_TRAIN_EXAMPLES}\n{_EXIT_CODES}",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    train.set_defaults(run=run["train"], parser=train)
    _add_subject(train)
    _add_server(train)
    _add_goals(train)
    _add_output(train)
    check = commands.add_parser(
        "check",
        help="ask a running server what it is and how fast it answers",
        description="Connect to a running server: handshake, spaces, versions, latency.",
        epilog=_EXIT_CODES,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    check.set_defaults(run=run["check"], parser=check)
    _add_check(check)
    compare = commands.add_parser(
        "compare",
        help="train CartPole in several ways, and say what each of them costs",
        description="Train PPO on CartPole in several ways, in turns; print a table, draw a picture.",
        epilog=_EXIT_CODES,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    compare.set_defaults(run=run["compare"], parser=compare)
    _add_compare(compare)
    export = commands.add_parser(
        "export",
        help="write the policy of a checkpoint as an ONNX file that any runtime runs",
        description="Write the policy of a checkpoint as an ONNX file, with filter, sampling and "
        "scaling of actions inside (docs/onnx.md), and compare it with RLlib's own module.",
        epilog=_EXIT_CODES,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    export.set_defaults(run=run["export"], parser=export)
    _add_export(export)
    return parser


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained")
    subject = group.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--env", metavar="ID", help="spaces of this Gymnasium environment, which runs elsewhere"
    )
    subject.add_argument("--spaces", metavar="FILE", help="spaces from a JSON file (docs/cli.md)")
    subject.add_argument(
        "--config",
        metavar="MODULE:NAME",
        help="an AlgorithmConfig, or a function that returns one; other options override it",
    )
    group.add_argument("--algo", choices=ALGORITHMS, help="default: PPO")
    group.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a setting of the AlgorithmConfig as JSON, such as lr=0.0003; model_config={...}",
    )
    group.add_argument("--seed", type=int, help="of weights and learner")
    group.add_argument(
        "--num-env-runners",
        metavar="N",
        type=int,
        choices=(0, 1),
        help="1: the server in a process of its own (default); 0: in the training process",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    default = PolicyServerConfig()
    group = parser.add_argument_group("where it listens, and whom it admits")
    group.add_argument("--host", help=f"interface; default: {default.host}")
    group.add_argument(
        "--port",
        type=whole_number(0, 65535),
        help=f"TCP port, 0 for a free one; default: {default.port}",
    )
    group.add_argument(
        "--address-file", metavar="FILE", help="write the bound HOST:PORT there when ready"
    )
    credentials.add_server_options(group)
    group.add_argument(
        "--while-learning",
        choices=("auto", "hold", "serve"),
        help="actions while RLlib learns wait (hold) or flow (serve); "
        "auto: hold for PPO, serve for the others (default)",
    )
    group.add_argument(
        "--when-full",
        choices=("wait", "discard"),
        help="experience beyond the buffer delays answers (default), or replaces the oldest",
    )
    group.add_argument(
        "--client-config",
        metavar="JSON",
        type=json_object,
        help="told to every simulator as client.config",
    )


def _add_goals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when it ends (without any of these: at Ctrl-C)")
    group.add_argument("--stop-return", metavar="R", type=finite_number, help="at this mean return")
    group.add_argument(
        "--stop-iters", metavar="N", type=whole_number(1), help="after so many iterations"
    )
    group.add_argument(
        "--stop-steps", metavar="N", type=whole_number(1), help="after so many env steps"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what it leaves behind")
    group.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path, help="checkpoints, DIR/latest is the newest"
    )
    group.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=whole_number(1),
        default=5,
        help="iterations between checkpoints; default: 5",
    )
    group.add_argument(
        "--keep-checkpoints",
        metavar="N",
        type=whole_number(1),
        default=3,
        help="how many stay; default: 3",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from DIR/latest, if there is one"
    )
    group.add_argument(
        "--plot",
        metavar="FILE.png",
        type=Path,
        help="learning curve; default: DIR/learning_curve.png with --checkpoint-dir",
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    group.add_argument("--debug", action="store_true", help="log everything to standard error")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="HOST:PORT", help="of the policy server")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        default=5.0,
        help="to connect; default: 5",
    )
    credentials.add_client_options(parser)
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=tuple(WAYS),
        default=tuple(WAYS),
        metavar="WAY",
        help=f"of {', '.join(WAYS)}; default: all",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=whole_number(1),
        default=3,
        help="of each way; default: 3",
    )
    parser.add_argument(
        "--stop-return", metavar="R", type=finite_number, default=450.0, help="default: 450"
    )
    parser.add_argument(
        "--stop-iters", metavar="N", type=whole_number(1), default=150, help="default: 150"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/compare"),
        help="for comparison.json and comparison.png; default: runs/compare",
    )
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="directory of an RLlib checkpoint, or of --checkpoint-dir",
    )
    parser.add_argument("file", metavar="FILE.onnx", type=Path, help="replaced if it exists")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _version() -> str:
    try:
        return f"policy-server {metadata.version('policy-server')}"
    except metadata.PackageNotFoundError:
        return "policy-server (not installed)"
