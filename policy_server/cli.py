"""``policy-server``: train a policy that simulators connect to, and look at a running server.

Nothing heavy is imported before the options have been understood. Main thread only.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Final

from client_sdk import credentials
from client_sdk.errors import InvalidValueError
from client_sdk.option_types import EXIT_USAGE
from policy_server.commands.ending import Ending
from policy_server.commands.options import build_parser

EXIT_FAILED = 1
EXIT_ENVIRONMENT = 3
EXIT_PORT_IN_USE = 4

RAY_VERSION = "2.60.0"
"""Ray's EnvRunner API changes between minor releases; this one is what we are written against."""
_MODULES = ("ray", "torch", "onnx", "onnxruntime", "grpc_health", "grpc_reflection", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    with Ending() as ending:
        try:
            options = build_parser(_COMMANDS).parse_args(arguments)
            logging.basicConfig(
                level=logging.DEBUG if options.debug else logging.WARNING,
                format="%(levelname)s %(name)s: %(message)s",
            )
            code = int(options.run(options, ending))
        except KeyboardInterrupt:
            code = ending.exit_code
    ending.leave(code)
    return code


def _train(options: argparse.Namespace, ending: Ending) -> int:
    if problem := _inconsistent(options):
        options.parser.error(problem)
    if problem := _missing():
        return _fail(EXIT_ENVIRONMENT, problem)
    try:
        server = _server_fields(options)
    except InvalidValueError as error:
        options.parser.error(" ".join(str(error).split()))
    # Only now: these import what may be missing.
    from policy_server.commands.training import train
    from policy_server.commands.training_config import OptionError, TrainOptions
    from policy_server.commands.training_errors import PortInUseError, TrainingError

    try:
        return train(
            TrainOptions(
                algo=None if options.config else options.algo or "PPO",
                env=options.env,
                spaces=options.spaces,
                config=options.config,
                server=server,
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
    from client_sdk.errors import PolicyClientError
    from policy_server.commands.check import check, table

    try:
        found = check(
            options.address,
            token=credentials.token(options),
            tls=credentials.client_tls(options),
            insecure=options.insecure,
            timeout_s=options.timeout,
        )
    except InvalidValueError as error:  # nothing was asked of anybody yet
        options.parser.error(" ".join(str(error).split()))
    except PolicyClientError as error:
        return _fail(EXIT_FAILED, " ".join(str(error).split()))
    print(table(found))
    return 0


def _compare(options: argparse.Namespace, _ending: Ending) -> int:
    if problem := _missing():
        return _fail(EXIT_ENVIRONMENT, problem)
    from policy_server.commands.comparison import CompareOptions, ComparisonError, compare

    try:
        compare(
            CompareOptions(
                ways=tuple(dict.fromkeys(options.ways)),
                seeds=options.seeds,
                stop_return=options.stop_return,
                stop_iters=options.stop_iters,
                out=options.out,
            )
        )
    except (ComparisonError, OSError) as error:
        return _fail(EXIT_FAILED, str(error))
    return 0


def _export(options: argparse.Namespace, _ending: Ending) -> int:
    if not options.file.parent.is_dir():
        options.parser.error(f"argument FILE: no such directory: {options.file.parent}")
    if options.file.is_dir():
        options.parser.error(f"argument FILE: {options.file} is a directory")
    if problem := _missing():
        return _fail(EXIT_ENVIRONMENT, problem)
    # Only now: these import what may be missing.
    from policy_server.commands.check import table
    from policy_server.commands.export import ExportError, export
    from policy_server.commands.ray_noise import quiet_loggers
    from policy_server.commands.restored import CheckpointError

    if not options.debug:
        quiet_loggers()
    try:
        print(table(export(options.checkpoint, options.file)))
    except CheckpointError as error:
        options.parser.error(f"argument CHECKPOINT: {error}")
    except ExportError as error:
        return _fail(EXIT_FAILED, str(error))
    return 0


_COMMANDS: Final = {"train": _train, "check": _check, "compare": _compare, "export": _export}


def _inconsistent(options: argparse.Namespace) -> str | None:
    """What each option alone cannot tell, in one line."""
    if options.resume and options.checkpoint_dir is None:
        return "argument --resume: needs --checkpoint-dir"
    if options.config is not None and options.algo is not None:
        return "argument --algo: not allowed with argument --config, which names the algorithm"
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
    """The fields of PolicyServerConfig that were given; what was not is left to the config.

    Raises:
        InvalidValueError: A token or a certificate is none.
    """
    names = ("host", "port", "address_file", "insecure", "while_learning", "when_full")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if (token := credentials.token(options)) is not None:
        given["token"] = token
    if (tls := credentials.server_tls(options)) is not None:
        given["tls"] = tls
    if options.client_config is not None:
        given["client_config"] = options.client_config
    return given


if __name__ == "__main__":
    sys.exit(main())
