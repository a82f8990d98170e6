"""``HostedEnv``: Gymnasium environments in lockstep, between messages.

Knows nothing of gRPC, handles and leases. Its environments are touched by one thread alone, the one
that makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from google.protobuf.struct_pb2 import Struct
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.steps import OneStep, StepMessages, Stepped
from client_sdk.wire.structs import dict_of_struct, fill_struct_leniently

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class EnvironmentFault(Fault):
    """The environment itself raised, or gave what its spaces do not hold: it must be closed."""

    def __init__(self, doing: str, error: BaseException, number: int | None = None) -> None:
        said = _said(error)
        which = "the environment" if number is None else f"environment {number}"
        super().__init__(
            Reason.ENVIRONMENT_FAILED,
            f"{which} failed in {doing}: {type(error).__name__}{': ' if said else ''}{said}",
        )


_MAX_SAID_BYTES = 1500
"""Of an exception's own words: they may travel in a trailer, percent-encoded, and 8 KiB of those
are all that gRPC is sure to pass on."""


def _said(error: BaseException) -> str:
    """An exception's own words in one line that can be sent, whatever its class makes of them."""
    try:
        words = " ".join(str(error).split())
    except Exception:
        return "(it cannot say what is wrong: its __str__ failed, too)"
    data = words.encode(errors="backslashreplace")  # a lone surrogate is no UTF-8
    if len(data) <= _MAX_SAID_BYTES:
        return data.decode()
    return f"{data[:_MAX_SAID_BYTES].decode(errors='ignore')} ... (the host's log has all of it)"


class HostedEnv:
    """N environments of the same kind, or a single one without autoreset.

    N environments reset themselves: the step after an end is a reset that ignores its action
    (Gymnasium's NEXT_STEP autoreset).

    Attributes:
        observation_space: Of one environment.
        action_space: Of one environment.
        metadata: Of the first environment.
        renders: Whether ``render`` works, once reset. Any thread.
        n: How many.
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], num_envs: int = 0) -> None:
        """Make the environments.

        Args:
            make: Called once for each.
            num_envs: 0: a single one, which only ``reset`` resets.

        Raises:
            EnvironmentFault: An environment could not be made, or they differ.
            Fault: SPACE_MISMATCH; the contract has no such space.
        """
        self.n = num_envs or 1
        self._autoreset = num_envs > 0
        # Which one failed; None where there is but one.
        self._numbers: Sequence[int | None] = range(self.n) if self._autoreset else (None,)
        self._envs: list[gym.Env[Any, Any]] = []
        try:
            for _ in range(self.n):
                self._envs.append(_guarded("make", lambda: _environment(make())))
            self._read_spaces()
        except BaseException:
            self.close()
            raise
        self._running = [False] * self.n
        self._begun = False
        self._left_out: set[str] = set()

    def _read_spaces(self) -> None:
        first = self._envs[0]
        self.observation_space = first.observation_space
        self.action_space = first.action_space
        self.metadata: Mapping[str, Any] = first.metadata or {}
        self.renders = first.render_mode == "rgb_array"
        for env in self._envs[1:]:
            if (env.observation_space, env.action_space) != (
                self.observation_space,
                self.action_space,
            ):
                raise EnvironmentFault(
                    "make", ValueError("environments of one handle must have the same spaces")
                )
        self._observations = SpaceCodec(self.observation_space)
        self._actions = SpaceCodec(self.action_space)

    def messages(self, handle: str) -> StepMessages:
        """How its steps are written and read, under that handle. Any thread."""
        return StepMessages(handle, self._observations, self._actions, self.n)

    def actions_in(self, batch: pb.Batch) -> Columns:
        """What was received, for ``step``. Any thread.

        Raises:
            Fault: It is no batch of so many actions.
        """
        return self._actions.decode(batch, self.n, "actions")

    def reset(self, request: pb.ResetRequest, response: pb.ResetResponse) -> None:
        """Begin an episode in each environment.

        Raises:
            Fault: The request is wrong; nothing was reset.
            EnvironmentFault: An environment failed.
        """
        seeds: Sequence[int | None] = request.seeds or [None] * self.n
        if len(seeds) != self.n:
            raise Fault(
                Reason.MALFORMED_TENSOR,
                f"expected no seeds or {self.n}, one per environment, got {len(seeds)}",
                "seeds",
            )
        options = None
        if request.HasField("options"):
            options = dict_of_struct(request.options, whole_numbers=True)
        observations, infos = [], []
        for number, env, seed in zip(self._numbers, self._envs, seeds, strict=True):
            observation, info = _reset(env, "reset", number, seed=seed, options=options)
            observations.append(observation)
            infos.append(info)
        self._running = [True] * self.n
        self._begun = True
        columns = self._columns_of(observations, "reset")
        self._observations.encode(columns, response.observations)
        response.infos.extend(self._told(infos, "reset"))

    def step(self, actions: Columns) -> Stepped:
        """One step of each environment.

        Args:
            actions: Columns ``[n, ...]`` of the action space's leaves. Rows may lie outside it.

        Returns:
            What to tell. May share memory with the environments: write it before the next step.

        Raises:
            Fault: An action is wrong, or it is not time for a step; none has stepped.
            EnvironmentFault: An environment failed.
        """
        self._check_state()
        running = self._running
        for row, fault in self._actions.row_faults(actions, "actions").items():
            if running[row]:
                where = f"row {row}: " if self._autoreset else ""
                raise Fault(fault.reason, f"{where}{fault.message}", fault.field)
        value, numbers = self._actions.value, self._numbers
        observations, infos = [], []
        rewards, terminated, truncated = [], [], []
        for row, env in enumerate(self._envs):
            if running[row]:
                observation, reward, ended, cut, info = _stepped(
                    env, value(actions, row), numbers[row]
                )
            else:
                observation, info = _reset(env, "step", numbers[row])
                reward, ended, cut = 0.0, False, False
            observations.append(observation)
            infos.append(info)
            rewards.append(reward)
            terminated.append(ended)
            truncated.append(cut)
        self._running = [not (a or b) for a, b in zip(terminated, truncated, strict=True)]
        columns = self._columns_of(observations, "step")
        return Stepped(columns, rewards, terminated, truncated, self._told(infos, "step"))

    def step_one(self, action: Any) -> OneStep:
        """The same where there is but one, with a value of its action space, by a shorter way.

        Returns:
            What it gave, for ``told``: not looked at yet but for its ends.
        """
        if not self._running[0]:
            self._check_state()
            observation, info = _reset(self._envs[0], "step", self._numbers[0])
            self._running[0] = True
            return observation, 0.0, False, False, info
        step = _stepped(self._envs[0], action, self._numbers[0])
        self._running[0] = not (step[2] or step[3])
        return step

    def told(self, step: OneStep) -> Stepped:
        """What to tell of a step of a single one; as ``step``."""
        observation, reward, terminated, truncated, info = step
        columns = self._columns_of([observation], "step")
        return Stepped(columns, (reward,), (terminated,), (truncated,), self._told([info], "step"))

    def _check_state(self) -> None:
        if not self._begun:
            raise Fault(
                Reason.STEP_OUT_OF_ORDER, "expected Reset before the first Step; reset first"
            )
        if not self._autoreset and not self._running[0]:
            raise Fault(Reason.EPISODE_ENDED, "the episode has ended; reset before the next step")

    def _columns_of(self, observations: list[Any], doing: str) -> Columns:
        try:
            if self.n == 1:
                return self._observations.columns_of(observations[0])
            return self._observations.columns_of_batch(observations, self.n)
        except Fault as fault:
            raise EnvironmentFault(doing, ValueError(str(fault))) from fault

    def _told(self, infos: list[Any], doing: str) -> list[Struct]:
        """A message for each; none at all where all are empty."""
        if not any(infos):
            return []
        told = []
        for info in infos:
            if not isinstance(info, Mapping):
                raise EnvironmentFault(
                    doing, TypeError(f"expected a dict as info, got {type(info).__name__}")
                )
            told.append(message := Struct())
            for why in fill_struct_leniently(message, info):
                self._note_left_out(why)
        return told

    def _note_left_out(self, why: str) -> None:
        """Once for each, and not without end."""
        if why not in self._left_out and len(self._left_out) < 20:
            self._left_out.add(why)
            logger.warning("left out of info, for it cannot be sent: %s", why)

    def render(self, index: int) -> NDArray[np.uint8]:
        """What one environment looks like: [height, width, 3].

        Raises:
            Fault: There is no such environment, or it was not made to be rendered so.
            EnvironmentFault: It failed.
        """
        if not 0 <= index < self.n:
            raise Fault(
                Reason.SPACE_MISMATCH, f"expected 0 to {self.n - 1}, got {index}", "env_index"
            )
        env = self._envs[index]
        if env.render_mode != "rgb_array":
            modes = ", ".join(map(str, self.metadata.get("render_modes", ()))) or "none"
            raise Fault(
                Reason.WRONG_MODE,
                f'expected an environment made with render_mode "rgb_array", got '
                f"{env.render_mode!r}; it can do: {modes}. Make it with that mode, or start the "
                """host with --kwargs '{"render_mode": "rgb_array"}'""",
            )
        if not self._begun:
            raise Fault(Reason.STEP_OUT_OF_ORDER, "expected Reset before Render; reset first")
        frame = np.asarray(_guarded("render", env.render))
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise EnvironmentFault(
                "render",
                ValueError(f"expected uint8 [height, width, 3], got {frame.dtype} {frame.shape}"),
            )
        return frame

    def close(self) -> None:
        """Close all of them, whatever one of them says to it."""
        for env in self._envs:
            try:
                env.close()  # type: ignore[no-untyped-call]
            except BaseException:  # it is gone all the same
                logger.warning("an environment failed in close", exc_info=True)
        self._envs = []


def _environment(made: Any) -> gym.Env[Any, Any]:
    """What was made, if it can be hosted at all: a function may return anything."""
    if not isinstance(made, gym.Env):
        raise TypeError(f"expected a gymnasium.Env, got {type(made).__name__}")
    for name in ("observation_space", "action_space"):
        if not isinstance(space := getattr(made, name, None), gym.Space):
            raise TypeError(f"expected a gymnasium.Space as {name}, got {type(space).__name__}")
    return made


def _reset(env: gym.Env[Any, Any], doing: str, number: int | None, **how: Any) -> tuple[Any, Any]:
    try:
        observation, info = env.reset(**how)
        return observation, info
    except BaseException as error:  # even SystemExit: it is the environment's, not ours
        raise EnvironmentFault(doing, error, number) from error


def _stepped(env: gym.Env[Any, Any], action: Any, number: int | None) -> OneStep:
    try:
        observation, reward, terminated, truncated, info = env.step(action)
        return observation, float(reward), bool(terminated), bool(truncated), info
    except BaseException as error:  # even SystemExit: it is the environment's, not ours
        raise EnvironmentFault("step", error, number) from error


def _guarded(doing: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except BaseException as error:  # even SystemExit: it is the environment's, not ours
        raise EnvironmentFault(doing, error) from error
