"""``policy-client host``: serve a Gymnasium environment to a trainer that steps it. Main thread only."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from client_sdk import credentials
from client_sdk.option_types import EXIT_USAGE, json_object, whole_number

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CANNOT_LISTEN = 4

_GRACE_S = 4.0
"""From the parent's end to ours, whatever an environment is doing."""

_EXAMPLES = """\
examples:
  policy-client host CartPole-v1 --port 9901
  policy-client host my_simulator:make_env --kwargs '{"level": 3}' --port 0 --address-file address
  policy-client host CartPole-v1 --host 0.0.0.0 --tls-cert host.pem --tls-key host.key --token-file token
"""


def add_parser(commands: Any, epilog: str) -> None:
    """Add the command to a program's."""
    host = commands.add_parser(
        "host",
        help="serve a Gymnasium environment to a trainer that steps it",
        description="Serve a Gymnasium environment: whoever connects (client_sdk.RemoteEnv, "
        "RemoteVectorEnv) gets environments of its own and steps them.",
        epilog=f"{_EXAMPLES}\n{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    host.add_argument(
        "env",
        metavar="ENV",
        help="Gymnasium id, such as CartPole-v1 or package:Id-v0; or module:function, which "
        "returns an environment",
    )
    host.add_argument(
        "--kwargs", type=json_object, default={}, metavar="JSON", help="its keyword arguments"
    )
    host.add_argument(
        "--any-env",
        action="store_true",
        help="serve every registered environment that a client asks for, not only ENV",
    )
    host.add_argument("--host", default="127.0.0.1", help="interface (default: 127.0.0.1)")
    host.add_argument(
        "--port", type=int, default=9901, help="TCP port; 0 takes a free one (default: 9901)"
    )
    host.add_argument(
        "--address-file", metavar="F", help="write the bound HOST:PORT there, once it answers"
    )
    host.add_argument(
        "--parent-pid",
        type=whole_number(1, 2**31 - 1),
        metavar="PID",
        help="end when that process is gone",
    )
    host.add_argument(
        "--max-envs",
        type=int,
        default=256,
        metavar="N",
        help="environments that are open at once (default: 256)",
    )
    host.add_argument(
        "--lease",
        type=float,
        default=60.0,
        metavar="S",
        help="close environments of which nothing was heard for this long (default: 60)",
    )
    credentials.add_server_options(host)
    host.add_argument("--debug", action="store_true", help="log in detail")
    host.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal, or the parent's end.

    Returns:
        The exit code.
    """
    # Gymnasium and gRPC are not needed to refuse a bad option.
    import gymnasium as gym

    from client_sdk.env_server import EnvServer, EnvServerConfig
    from client_sdk.listening import ServerStartError
    from client_sdk.parent import ParentError, when_process_ends

    if os.getcwd() not in sys.path:  # a console script does not look there
        sys.path.insert(0, os.getcwd())
    parent = _Parent(options.parent_pid)
    try:
        if options.parent_pid is not None:  # before anything that takes time, such as an import
            when_process_ends(options.parent_pid, parent.ended)
    except ParentError as error:
        return _failed(EXIT_FAILED, str(error))
    try:
        config = EnvServerConfig(
            host=options.host,
            port=options.port,
            address_file=options.address_file,
            token=credentials.token(options),
            tls=credentials.server_tls(options),
            insecure=bool(options.insecure),
            any_env=options.any_env,
            max_envs=options.max_envs,
            lease_s=options.lease,
        )
        server = EnvServer(options.env, config, kwargs=options.kwargs)
    except ValueError as error:
        return _failed(EXIT_USAGE, str(error))
    except (gym.error.Error, ImportError) as error:
        return _failed(EXIT_USAGE, f"cannot host {options.env!r}: {error}")
    except Exception as error:  # the module's own, while it is imported
        logger.debug("the import failed", exc_info=True)
        return _failed(EXIT_USAGE, f"cannot host {options.env!r}: {type(error).__name__}: {error}")
    try:
        parent.shut = server.shut
        with server:
            print(f"hosting {server.name} on {server.address}", flush=True)
            server.wait()
    except ServerStartError as error:
        return _failed(EXIT_CANNOT_LISTEN, str(error))
    return 0


class _Parent:
    """Ends this process once its parent is gone, even if an environment hangs.

    Attributes:
        shut: Ends the host in order; None: there is nothing yet to put in order.
    """

    def __init__(self, pid: int | None) -> None:
        self.shut: Callable[[], None] | None = None
        self._pid = pid

    def ended(self) -> None:
        """It is gone. In a thread of its own."""
        logger.info("process %s, the parent, has ended", self._pid)
        shut = self.shut
        if shut is None:
            os._exit(0)
        deadline = threading.Timer(_GRACE_S, os._exit, (0,))
        deadline.daemon = True
        deadline.start()
        shut()


def _failed(code: int, message: str) -> int:
    print(f"policy-client: {' '.join(message.split())}", file=sys.stderr)
    return code
