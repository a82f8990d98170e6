"""Which environments a host makes: by Gymnasium id, or by a function of the application.

Immutable; any thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym

from client_sdk.wire.faults import Fault, Reason

EnvFunction = Callable[..., gym.Env[Any, Any]]


class EnvSource:
    """Makes environments: the host's own, and registered ones if they may be asked for.

    Attributes:
        name: Of the host's own.
    """

    def __init__(
        self, env: str | EnvFunction, kwargs: Mapping[str, Any], *, any_env: bool = False
    ) -> None:
        """Look it up; nothing is made yet.

        Args:
            env: A Gymnasium id, ``module:function``, or the function itself.
            kwargs: For it; a client's own come on top.
            any_env: Whether clients may ask for every registered id.

        Raises:
            gymnasium.error.Error: No such id.
            ModuleNotFoundError: No such module.
        """
        self._kwargs = dict(kwargs)
        self._any_env = any_env
        if isinstance(env, str):
            self.name = env
            self._function = _function_of(env) or _gymnasium(env)
        else:
            self.name = getattr(env, "__name__", type(env).__name__)
            self._function = env

    def maker(
        self, env_id: str, kwargs: Mapping[str, Any], render_mode: str
    ) -> Callable[[], gym.Env[Any, Any]]:
        """What makes one environment.

        Args:
            env_id: As a client asks for it; empty: the host's own.
            kwargs: The client's.
            render_mode: The client's; empty: whatever ``kwargs`` say.

        Raises:
            Fault: UNKNOWN_ENVIRONMENT; there is none of that name here.
        """
        merged = {**kwargs, **({"render_mode": render_mode} if render_mode else {})}
        if env_id in ("", self.name):
            function, merged = self._function, {**self._kwargs, **merged}
        else:
            function = self._asked_for(env_id)
        return lambda: function(**merged)

    def _asked_for(self, env_id: str) -> EnvFunction:
        if not self._any_env:
            raise Fault(
                Reason.UNKNOWN_ENVIRONMENT,
                f"expected {self.name!r} or an empty id, for this host has nothing else, got "
                f"{env_id!r:.200}. Start the host with that environment, or with --any-env",
                "env_id",
            )
        # "module:Id-v0" would import what a stranger names.
        if ":" in env_id or env_id not in gym.registry:
            raise Fault(
                Reason.UNKNOWN_ENVIRONMENT,
                f"expected the id of an environment that is registered on the host, such as "
                f"{self.name!r}, got {env_id!r:.200}. Import the package that registers it there",
                "env_id",
            )
        return _gymnasium(env_id)


def _function_of(name: str) -> EnvFunction | None:
    """What ``module:function`` names; None: it is no such name."""
    module, separator, attribute = name.partition(":")
    if not (module and separator):
        return None
    found = getattr(importlib.import_module(module), attribute, None)
    return found if callable(found) else None


def _gymnasium(env_id: str) -> EnvFunction:
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        module, separator, name = env_id.partition(":")
        if not separator:
            raise
        raise gym.error.NameNotFound(
            f"the module {module!r} has no function {name!r}, and registers no such environment: "
            f"{error}"
        ) from error
    return lambda **kwargs: gym.make(env_id, **kwargs)
