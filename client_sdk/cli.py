"""``policy-client``: run simulators against a policy server, or host them. Main thread only."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from client_sdk import certificates, credentials, ending, host_command, watch_command
from client_sdk.config import Address, Timeouts
from client_sdk.errors import InvalidValueError, PolicyClientError
from client_sdk.option_types import (
    EXIT_USAGE,
    Parser,
    positive_seconds,
    seconds_from_zero,
    whole_number,
)

if TYPE_CHECKING:
    from client_sdk.runner import RunSummary

EXIT_FAILED = 1

_GRACE_S = 4.5
"""From a signal to the end of the process."""

_EXIT_CODES = """\
exit codes:
  0    that many episodes have ended, or the files are written; a host's parent has ended
  1    no server answers, or it refuses this client; the environment gives what cannot be sent;
       files cannot be written
  2    a bad option, or no such environment
  4    a host cannot listen: the port is in use
  129  ended by the end of its terminal (SIGHUP), unless nohup has it go on
  130  ended by Ctrl-C (SIGINT)
  143  ended by SIGTERM
"""

_RUN_EXAMPLES = """\
examples:
  policy-client run CartPole-v1 --server localhost:9900 --envs 16
  policy-client run my_package:Warehouse-v0 --server trainer:9900 --tls-ca ca.pem --token-file token
  policy-client run CartPole-v1 --server localhost:9900 --envs 16 --inference local
  policy-client run CartPole-v1 --server localhost:9900 --episodes 20 --greedy
"""

_CERTS_EXAMPLES = """\
examples:
  policy-client certs certs --host trainer.example 192.168.1.20
"""


class _Signal:
    """Turns the first signal to end into KeyboardInterrupt; later ones find us on our way out.

    If that way is too long (an environment that hangs), the process ends without it.
    """

    number = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number = number
            deadline = threading.Timer(_GRACE_S, os._exit, (128 + number,))
            deadline.daemon = True
            deadline.start()
            raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    stopped = _Signal()
    previous = {number: signal.signal(number, stopped) for number in ending.wanted()}
    try:
        options = _parser().parse_args(arguments)
        logging.basicConfig(
            level=logging.DEBUG if options.debug else logging.INFO,
            format="%(message)s",
            stream=sys.stderr,
        )
        code = int(options.run(options))
        # What went wrong on the way out of a signal is not why it ended.
        return 128 + stopped.number if stopped.number else code
    except KeyboardInterrupt:
        return 128 + (stopped.number or signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="policy-client",
        description="Connect simulators to a policy server, or host them for a trainer.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="let the server act in a Gymnasium environment",
        description="Let the server act in a Gymnasium environment, and learn from it.",
        epilog=f"{_RUN_EXAMPLES}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(run=_run)
    run.add_argument(
        "env", metavar="ENV", help="Gymnasium id, such as CartPole-v1 or package:Id-v0"
    )
    run.add_argument(
        "--server", required=True, metavar="HOST:PORT", type=_address, help="the policy server"
    )
    run.add_argument(
        "--envs",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="environments that step together, one message for all (default: 1)",
    )
    run.add_argument(
        "--inference",
        choices=["remote", "local"],
        default="remote",
        help="remote: ask the server for every action (default); local: download the policy, act "
        "here and upload what was experienced",
    )
    run.add_argument(
        "--update-interval",
        type=seconds_from_zero,
        default=0.0,
        metavar="S",
        help="local: seconds between two downloads of the policy, at least; 0: whenever there is "
        "another (default)",
    )
    run.add_argument("--cache-dir", metavar="D", help="local: keep policy files here")
    run.add_argument(
        "--spool-dir",
        metavar="D",
        help="local: keep experience here that does not fit into memory while the server is away",
    )
    run.add_argument(
        "--spool-bytes",
        type=whole_number(1),
        metavar="N",
        help="local: keep at most so much experience, the newest (default: 268435456, 256 MiB)",
    )
    run.add_argument(
        "--episodes",
        type=whole_number(1),
        metavar="N",
        help="end after N episodes (default: never)",
    )
    run.add_argument("--seed", type=int, metavar="N", help="of the first reset; env i gets N + i")
    run.add_argument(
        "--greedy", action="store_true", help="take the likeliest actions; nothing is learnt"
    )
    run.add_argument(
        "--no-training", action="store_true", help="report returns, but learn nothing from them"
    )
    run.add_argument("--name", help="for the server's logs (default: host name and process id)")
    run.add_argument(
        "--connect-timeout",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="wait so long for a server that is not up yet (default: 60)",
    )
    credentials.add_client_options(run)
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.add_argument("--debug", action="store_true", help="log in detail")
    _add_certs(commands)
    host_command.add_parser(commands, _EXIT_CODES)
    watch_command.add_parser(commands, _EXIT_CODES)
    return parser


def _add_certs(commands: argparse._SubParsersAction[Parser]) -> None:
    certs = commands.add_parser(
        "certs",
        help="make certificates and a token for a server and its clients",
        description="Make an authority of your own, certificates that it signed, and a token.",
        epilog=f"{_CERTS_EXAMPLES}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    certs.set_defaults(run=_certs, debug=False)
    certs.add_argument(
        "directory", metavar="DIR", type=Path, help="a new directory for all of them"
    )
    certs.add_argument(
        "--host",
        dest="hosts",
        required=True,
        nargs="+",
        metavar="NAME",
        help="names and IP addresses under which clients reach the server; localhost is added",
    )
    certs.add_argument(
        "--days",
        type=whole_number(1),
        default=365,
        metavar="N",
        help="how long they last (default: 365)",
    )


def _version() -> str:
    try:
        return f"policy-client {metadata.version('policy-server')}"
    except metadata.PackageNotFoundError:
        return "policy-client (not installed)"


def _certs(options: argparse.Namespace) -> int:
    try:
        made = certificates.make(options.directory, options.hosts, days=options.days)
    except InvalidValueError as error:
        return _failed(EXIT_USAGE, str(error))
    except (OSError, ImportError) as error:
        return _failed(EXIT_FAILED, str(error))
    print(made)
    return 0


def _run(options: argparse.Namespace) -> int:
    # Gymnasium and gRPC are not needed to refuse a bad option.
    import gymnasium as gym

    from client_sdk.runner import run_gymnasium

    def report(summary: RunSummary) -> None:
        if not options.quiet:
            print(_line(summary), flush=True)

    if options.quiet:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        timeouts = dataclasses.replace(Timeouts(), connect_s=options.connect_timeout)
        summary = run_gymnasium(
            options.env,
            str(options.server),
            inference_mode=options.inference,
            num_envs=options.envs,
            episodes=options.episodes,
            training_enabled=not options.no_training,
            explore=not options.greedy,
            seed=options.seed,
            token=credentials.token(options),
            tls=credentials.client_tls(options),
            insecure=options.insecure,
            timeouts=timeouts,
            name=options.name,
            update_interval=options.update_interval,
            cache_dir=options.cache_dir,
            spool_dir=options.spool_dir,
            spool_bytes=options.spool_bytes,
            on_progress=report,
        )
    except (gym.error.Error, ModuleNotFoundError) as error:
        return _failed(EXIT_USAGE, f"cannot make {options.env!r}: {error}")
    except OSError as error:
        if isinstance(error, PolicyClientError):
            return _failed(EXIT_FAILED, str(error))
        return _failed(EXIT_USAGE, f"cannot read {error.filename}: {error.strerror}")
    except InvalidValueError as error:
        # With a reason it is what the environment is or gave, else an option.
        return _failed(EXIT_USAGE if error.reason is None else EXIT_FAILED, str(error))
    except PolicyClientError as error:
        return _failed(EXIT_FAILED, str(error))
    report(summary)
    return 0


def _failed(code: int, message: str) -> int:
    print(f"policy-client: {' '.join(message.split())}", file=sys.stderr)
    return code


def _line(summary: RunSummary) -> str:
    mean = "-" if math.isnan(summary.mean_return) else f"{summary.mean_return:.1f}"
    return (
        f"episodes {summary.episodes}  steps {summary.steps}  "
        f"steps/s {summary.steps_per_s:.0f}  mean return {mean}  "
        f"policy version {summary.policy_version}"
    )


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except InvalidValueError as error:
        raise argparse.ArgumentTypeError(error.message) from None


if __name__ == "__main__":
    sys.exit(main())
