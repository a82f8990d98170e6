"""``RemoteEnvCreator``: environments in a process beside each env runner, for RLlib to step.

What RLlib calls, and the environments that it gets, which hold on to the process that hosts them.
Any thread, one at a time; not usable after a fork.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from client_sdk import RemoteEnv, RemoteVectorEnv
from policy_server.host_process import HostError, HostProcess

__all__ = ["HostError", "RemoteEnvCreator"]

_NO_LIMIT = str(2**20)
"""Of environments: whoever asks for too many here, asks for them of themselves."""
_NUM_ENVS = "num_envs"
"""What RLlib adds to the ``env_config`` where it wants a vector environment."""


@dataclasses.dataclass(frozen=True)
class RemoteEnvCreator:
    """Makes an environment in a process of its own, which RLlib steps.

    ::

        tune.register_env("remote-cartpole", RemoteEnvCreator("CartPole-v1"))
        config.environment("remote-cartpole").env_runners(
            num_env_runners=2, num_envs_per_env_runner=8,
            gym_env_vectorize_mode="vector_entry_point",  # one message per step for all eight
        )

    Each env runner starts one host (``policy-client host``) for all of its environments. It ends
    with them, and with the runner, whichever way that ends. Where it dies, the next ``reset``
    starts another; for RLlib to get that far in the middle of an episode, set
    ``fault_tolerance(restart_failed_sub_environments=True)``.

    Picklable; calling it raises HostError where no host starts.
    """

    env: str
    """A Gymnasium id, or ``module:function``: what ``policy-client host`` serves."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, JSON values; RLlib's ``env_config`` comes on top."""
    host_command: Sequence[str] | None = None
    """Starts the host instead of ``policy-client host ENV``, for a simulator with a Python or a
    launcher of its own. ``--kwargs``, ``--port``, ``--address-file`` and ``--parent-pid`` are
    appended, and the environment variable POLICY_SERVER_TOKEN is set."""
    start_timeout_s: float = 60.0
    """A host must answer within this long, and make an environment within as long again."""

    def __post_init__(self) -> None:
        env: Any = self.env
        if not isinstance(env, str) or not env:
            raise ValueError(
                "RemoteEnvCreator.env: expected a Gymnasium id or 'module:function', which another "
                f"process can import, got {env!r}"
            )
        command: Any = self.host_command  # whatever its annotation says
        if command is not None and (isinstance(command, str) or not command):
            raise ValueError(
                "RemoteEnvCreator.host_command: expected a list of words, such as "
                f'["/opt/simulator/python", "-m", "simulator"], got {command!r}'
            )
        if not self.start_timeout_s > 0:
            raise ValueError(
                "RemoteEnvCreator.start_timeout_s: expected a positive number of seconds, got "
                f"{self.start_timeout_s!r}"
            )

    def __call__(self, env_config: Mapping[str, Any] | None = None) -> RemoteEnv | RemoteVectorEnv:
        """What RLlib calls: one environment, or a vector of them where it says how many."""
        given = dict(env_config or {})
        num_envs = given.pop(_NUM_ENVS, None)
        try:
            kwargs = json.dumps({**self.kwargs, **given}, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected JSON values as arguments of {self.env!r} (kwargs and env_config), which "
                f"travel to another process: {error}"
            ) from error
        command = self.host_command or (
            *(sys.executable, "-m", "client_sdk.cli", "host", self.env),
            *("--max-envs", _NO_LIMIT),
        )
        host = HostProcess.of_this_process((*command, "--kwargs", kwargs), self.start_timeout_s)
        return _HostedEnv(host) if num_envs is None else _HostedVectorEnv(host, num_envs)


class _Lease:
    """One environment's share of a host, given back once."""

    def __init__(self, host: HostProcess) -> None:
        self._host = host
        self._held = True
        self._at = ""
        host.join()

    def connection(self) -> dict[str, Any]:
        """Arguments of a remote environment; the host is started where it does not run."""
        self._at = self._host.address()
        return {
            "address": self._at,
            "token": self._host.token,
            "connect_timeout": self._host.start_timeout_s,
        }

    def moved(self, env: RemoteEnv | RemoteVectorEnv) -> bool:
        """Whether the host is somewhere else than this environment knows."""
        return self._held and self._host.address(lost=not env.connected) != self._at

    def release(self) -> None:
        """Give it back."""
        if self._held:
            self._held = False
            self._host.leave()


class _HostedEnv(RemoteEnv):
    """On a host of this process; ``reset`` follows it where it had to be started again."""

    def __init__(self, host: HostProcess) -> None:
        self._lease = _Lease(host)
        try:
            self._connect()
        except BaseException:
            self._lease.release()
            raise

    def _connect(self) -> None:
        super().__init__(**self._lease.connection())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See ``RemoteEnv``; raises HostError where no host starts any more."""
        if self._lease.moved(self):
            super().close()
            self._connect()
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        """See ``RemoteEnv``; the last environment ends the host."""
        super().close()
        self._lease.release()


class _HostedVectorEnv(RemoteVectorEnv):
    """The same for a vector of them."""

    def __init__(self, host: HostProcess, num_envs: int) -> None:
        self._lease = _Lease(host)
        try:
            self._connect(num_envs)
        except BaseException:
            self._lease.release()
            raise

    def _connect(self, num_envs: int) -> None:
        super().__init__(num_envs=num_envs, **self._lease.connection())

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """See ``RemoteVectorEnv``; raises HostError where no host starts any more."""
        if self._lease.moved(self):
            super().close_extras()
            self._connect(self.num_envs)
        return super().reset(seed=seed, options=options)

    def close_extras(self, **kwargs: Any) -> None:
        """See ``RemoteVectorEnv``; the last environment ends the host."""
        super().close_extras(**kwargs)
        self._lease.release()
