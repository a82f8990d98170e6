"""``policy-server``: train a policy that simulators connect to, and look at a running server.

Nothing heavy is imported before the options have been understood. Main thread only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from policy_server.config import PolicyServerConfig, ServerTls
from policy_server.ending import Ending

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_PORT_IN_USE = 4

RAY_VERSION = "2.60.0"
"""Ray's EnvRunner API changes between minor releases; this one is what we are written against."""
_MODULES = ("ray", "torch", "onnx", "onnxruntime", "grpc_health", "grpc_reflection", "rich")

_EXIT_CODES = """\
exit codes:
  0    the goal was reached, or the server answers
  1    training failed, or no policy server answers
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    with Ending() as ending:
        try:
            options = _parser().parse_args(arguments)
            logging.basicConfig(
                level=logging.DEBUG if options.debug else logging.WARNING,
                format="%(levelname)s %(name)s: %(message)s",
            )
            return int(options.run(options, ending))
        except KeyboardInterrupt:
            return ending.exit_code


def _train(options: argparse.Namespace, ending: Ending) -> int:
    if problem := _inconsistent(options):
        options.parser.error(problem)
    if problem := _missing():
        return _fail(EXIT_ENVIRONMENT, problem)
    # Only now: these import what may be missing.
    from policy_server.training import PortInUseError, TrainingError, train
    from policy_server.training_config import OptionError, TrainOptions

    try:
        return train(
            TrainOptions(
                algo=None if options.config else options.algo or "PPO",
                env=options.env,
                spaces=options.spaces,
                config=options.config,
                server=_server_fields(options),
                settings=tuple(options.settings),
                num_env_runners=options.num_env_runners,
                seed=options.seed,
                stop_return=options.stop_return,
                stop_iters=options.stop_iters,
                stop_steps=options.stop_steps,
                checkpoint_dir=options.checkpoint_dir,
                checkpoint_every=options.checkpoint_every,
                keep_checkpoints=options.keep_checkpoints,
                resume=options.resume,
                plot=options.plot,
                quiet=options.quiet,
            ),
            ending,
        )
    except OptionError as error:
        return _fail(EXIT_USAGE, f"{error} (see policy-server train --help)")
    except PortInUseError as error:
        return _fail(EXIT_PORT_IN_USE, str(error))
    except TrainingError as error:
        return _fail(EXIT_FAILED, str(error))


def _check(options: argparse.Namespace, _ending: Ending) -> int:
    from client_sdk.config import TlsConfig
    from client_sdk.errors import PolicyClientError
    from policy_server.check import check, table

    token = options.token_file.read_text().strip() if options.token_file else None
    try:
        tls = None
        if options.tls or options.tls_ca or options.tls_cert:
            tls = TlsConfig(options.tls_ca, options.tls_cert, options.tls_key)
        found = check(options.address, token=token, tls=tls, timeout_s=options.timeout)
    except PolicyClientError as error:
        return _fail(EXIT_FAILED, " ".join(str(error).split()))
    print(table(found))
    return 0


def _inconsistent(options: argparse.Namespace) -> str | None:
    """What each option alone cannot tell, in one line."""
    if options.resume and options.checkpoint_dir is None:
        return "argument --resume: needs --checkpoint-dir"
    if options.config is not None and options.algo is not None:
        return "argument --algo: not allowed with argument --config, which names the algorithm"
    if (options.tls_cert is None) != (options.tls_key is None):
        return "arguments --tls-cert and --tls-key: one needs the other"
    if options.tls_client_ca is not None and options.tls_cert is None:
        return "argument --tls-client-ca: needs --tls-cert and --tls-key"
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        return f"argument --plot: expected a name that ends in .png, got {options.plot}"
    return None


def _fail(code: int, message: str) -> int:
    print(f"policy-server: {message}", file=sys.stderr, flush=True)
    return code


def _missing() -> str | None:
    """What keeps the server from running here, in one line."""
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install 'policy-server[server]'"
    found = metadata.version("ray")
    if found.split(".")[:2] != RAY_VERSION.split(".")[:2]:
        return f"ray {RAY_VERSION} is needed, {found} is installed: pip install 'policy-server[server]'"
    return None


def _server_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of PolicyServerConfig that were given; what was not is left to the config."""
    names = ("host", "port", "address_file", "insecure", "while_learning", "when_full")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.token_file is not None:
        given["token"] = options.token_file.read_text().strip()
    if options.tls_cert is not None:
        given["tls"] = ServerTls(options.tls_cert, options.tls_key, options.tls_client_ca)
    if options.client_config is not None:
        given["client_config"] = options.client_config
    return given


def _existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


def _existing_file_name(text: str) -> str:
    return str(_existing_file(text))


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text!r}")
    return int(text)


def _at_least(lowest: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {lowest} up, got {text!r}"
            )
        return value

    return number


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a word needs no quotes


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
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
    train.set_defaults(run=_train, parser=train)
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
    check.set_defaults(run=_check)
    _add_check(check)
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
    group.add_argument("--algo", choices=("PPO", "DQN"), help="default: PPO")
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
        "--port", type=_port, help=f"TCP port, 0 for a free one; default: {default.port}"
    )
    group.add_argument(
        "--address-file", metavar="FILE", help="write the bound HOST:PORT there when ready"
    )
    group.add_argument(
        "--token-file", metavar="FILE", type=_existing_file, help="bearer token clients must carry"
    )
    group.add_argument("--tls-cert", metavar="PEM", type=_existing_file_name, help="certificate")
    group.add_argument("--tls-key", metavar="PEM", type=_existing_file_name, help="its private key")
    group.add_argument(
        "--tls-client-ca",
        metavar="PEM",
        type=_existing_file_name,
        help="clients must show a certificate signed by this one",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen beyond this machine without TLS and token all the same",
    )
    group.add_argument(
        "--while-learning",
        choices=("auto", "hold", "serve"),
        help="actions while RLlib learns wait (hold) or flow (serve); "
        "auto: hold for PPO, serve for DQN (default)",
    )
    group.add_argument(
        "--when-full",
        choices=("wait", "discard"),
        help="experience beyond the buffer delays answers (default), or replaces the oldest",
    )
    group.add_argument(
        "--client-config",
        metavar="JSON",
        type=_object,
        help="told to every simulator as client.config",
    )


def _add_goals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when it ends (without any of these: at Ctrl-C)")
    group.add_argument("--stop-return", metavar="R", type=float, help="at this mean return")
    group.add_argument(
        "--stop-iters", metavar="N", type=_at_least(1), help="after so many iterations"
    )
    group.add_argument(
        "--stop-steps", metavar="N", type=_at_least(1), help="after so many env steps"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what it leaves behind")
    group.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path, help="checkpoints, DIR/latest is the newest"
    )
    group.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=_at_least(1),
        default=5,
        help="iterations between checkpoints; default: 5",
    )
    group.add_argument(
        "--keep-checkpoints",
        metavar="N",
        type=_at_least(1),
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
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--token-file", metavar="FILE", type=_existing_file)
    parser.add_argument("--tls", action="store_true", help="encrypt, with the usual authorities")
    parser.add_argument("--tls-ca", metavar="PEM", type=_existing_file_name, help="authority")
    parser.add_argument("--tls-cert", metavar="PEM", type=_existing_file_name, help="for mTLS")
    parser.add_argument("--tls-key", metavar="PEM", type=_existing_file_name, help="its key")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=5.0, help="to connect; default: 5"
    )
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def _version() -> str:
    try:
        return f"policy-server {metadata.version('policy-server')}"
    except metadata.PackageNotFoundError:
        return "policy-server (not installed)"


if __name__ == "__main__":
    sys.exit(main())
