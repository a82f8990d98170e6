"""``OnnxPolicy``: one version of a policy as a complete ONNX file, loaded and run.

The policy server runs its batches through this class too, so there is one graph and one way to run
it. Needs numpy and onnxruntime, nothing else. N is the number of rows; letters beside it are the
space's own dimensions.

The graph maps observations and noise to actions; it draws no random numbers itself. Everything that
a program in any language must know to run it is in the file's metadata (``PolicySpec``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

__all__ = [
    "BoundPolicy",
    "FilterSpec",
    "InputSpec",
    "NoisePool",
    "NoiseSpec",
    "OnnxPolicy",
    "PolicyFileError",
    "PolicySpec",
    "StateSpec",
]

SCHEMA_VERSION: Final = "1"
"""Of the metadata; a file of another schema is refused."""

_PREFIX: Final = "policyserver."
_POOL_NUMBERS: Final = 8192

Columns: TypeAlias = dict[str, NDArray[Any]]
NoiseKind: TypeAlias = Literal["gumbel", "normal", "uniform"]


class PolicyFileError(ValueError):
    """A file is no policy, or one that this release cannot run."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One leaf of the observation space as an input of the graph."""

    path: str
    """JSON pointer without the first slash; "" for a space that is itself a leaf."""
    name: str
    """Of the graph's input."""
    dtype: str
    """Of the graph's input, as numpy says it: as the observation has it, but for float64 and for
    uint16 and wider, which are given as float32, or as int64 where they count choices."""
    shape: tuple[int, ...]
    """Of one row; the input is ``[N, *shape]``."""


@dataclasses.dataclass(frozen=True)
class NoiseSpec:
    """The random numbers that a graph asks for."""

    kind: NoiseKind
    """Gumbel(0, 1), N(0, 1) or U[0, 1)."""
    size: int
    """Numbers per row; the input is float32 ``[N, size]``."""
    greedy: float
    """Given in place of all of a row's numbers, it yields the likeliest action."""
    input: str = "noise"
    """Name of the graph's input."""


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """One tensor of a recurrent policy's memory. No release makes any yet."""

    input: str
    """Of the graph, ``[N, *shape]``; zeros at the start of an episode."""
    output: str
    """Of the graph; given to ``input`` at the episode's next step."""
    dtype: str
    """Of both, as numpy says it."""
    shape: tuple[int, ...]
    """Of one row."""


@dataclasses.dataclass(frozen=True)
class FilterSpec:
    """What the graph does to observations before its network sees them."""

    kind: Literal["mean_std"]
    """``clip((x - mean) / deviation)`` with the statistics of this version."""
    clip: float | None
    """Bound of the result's absolute value; None: unbounded."""


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """What a policy file says of itself."""

    policy_id: str
    version: int
    """RLlib's weights sequence number: later ones are newer within one server process."""
    algorithm: str
    """As RLlib calls it."""
    observation_space: str
    """``Space`` of the contract as protobuf JSON."""
    action_space: str
    """The same, of the actions that the application executes."""
    distribution: str
    """``categorical``, ``multi_categorical``, ``diag_gaussian``, ``squashed_gaussian`` or
    ``epsilon_greedy``."""
    noise: NoiseSpec
    inputs: tuple[InputSpec, ...]
    roles: Mapping[str, str]
    """Graph output by role: ``actions`` (learnt from), ``env_actions`` (to be executed; may be the
    same output), ``action_logp``, ``action_dist_inputs``."""
    recorded: tuple[str, ...]
    """Roles besides the actions that belong into the experience."""
    states: tuple[StateSpec, ...] = ()
    """Memory that goes from step to step; empty where there is none."""
    observation_filter: FilterSpec | None = None
    """Folded into the graph, which takes observations as they are; None: there is none."""

    def to_metadata(self) -> dict[str, str]:
        """The file's ``metadata_props``."""
        values = {
            "policy_id": self.policy_id,
            "policy_version": str(self.version),
            "algorithm": self.algorithm,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "distribution": self.distribution,
            "noise": json.dumps(dataclasses.asdict(self.noise)),
            "inputs": json.dumps([dataclasses.asdict(each) for each in self.inputs]),
            "roles": json.dumps(dict(self.roles)),
            "recorded": json.dumps(self.recorded),
            "states": json.dumps([dataclasses.asdict(each) for each in self.states]),
            "observation_filter": json.dumps(
                self.observation_filter and dataclasses.asdict(self.observation_filter)
            ),
        }
        return {_PREFIX + key: value for key, value in {"schema": SCHEMA_VERSION, **values}.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PolicySpec:
        """What ``to_metadata`` wrote.

        Raises:
            PolicyFileError: It is missing, damaged or of another schema.
        """
        schema = metadata.get(_PREFIX + "schema")
        if schema != SCHEMA_VERSION:
            raise PolicyFileError(
                f"expected a policy file of schema {SCHEMA_VERSION}, got "
                + ("an ONNX file without our metadata" if schema is None else f"schema {schema}")
            )
        try:
            said = {
                key: json.loads(metadata[_PREFIX + key])
                for key in ("inputs", "noise", "roles", "recorded", "states", "observation_filter")
            }
            folded = said["observation_filter"]
            return cls(
                policy_id=metadata[_PREFIX + "policy_id"],
                version=int(metadata[_PREFIX + "policy_version"]),
                algorithm=metadata[_PREFIX + "algorithm"],
                observation_space=metadata[_PREFIX + "observation_space"],
                action_space=metadata[_PREFIX + "action_space"],
                distribution=metadata[_PREFIX + "distribution"],
                noise=NoiseSpec(**said["noise"]),
                inputs=tuple(InputSpec(**_with_shape(each)) for each in said["inputs"]),
                roles=said["roles"],
                recorded=tuple(said["recorded"]),
                states=tuple(StateSpec(**_with_shape(each)) for each in said["states"]),
                observation_filter=None if folded is None else FilterSpec(**folded),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyFileError(f"the policy file's metadata is damaged: {error!r}") from error


def _with_shape(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {**values, "shape": tuple(values["shape"])}


class NoisePool:
    """Random numbers for one policy's rows, drawn in bulk. One thread at a time.

    All versions of a policy share one pool: what it gives depends on the policy's noise only.

    Attributes:
        spec: Which numbers.
    """

    def __init__(self, spec: NoiseSpec, rng: np.random.Generator | None = None) -> None:
        self.spec = spec
        self._rng = np.random.default_rng() if rng is None else rng
        self._rows = max(1, _POOL_NUMBERS // max(1, spec.size))
        self._greedy = np.full((1, spec.size), spec.greedy, np.float32)
        self._greedy.setflags(write=False)
        self._pool = np.empty((0, spec.size), np.float32)
        self._next = 0

    def take(self, greedy: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Noise for the next rows.

        Args:
            greedy: ``[N]``; which rows get the likeliest action instead of a sampled one.

        Returns:
            ``[N, size]``, not to be written to.
        """
        n = len(greedy)
        if n == 1 and greedy[0]:
            return self._greedy
        start = self._next
        self._next = end = start + n
        if end > len(self._pool):
            # A new array: rows given out earlier stay what they are.
            self._pool = self._draw(max(n, self._rows))
            start, self._next = 0, n
        rows = self._pool[start : start + n]
        if n > 1 and np.count_nonzero(greedy):
            rows = np.where(greedy[:, None], self._greedy, rows)
        return rows

    def _draw(self, rows: int) -> NDArray[np.float32]:
        shape = (rows, self.spec.size)
        if self.spec.kind == "normal":
            return self._rng.standard_normal(shape, np.float32)
        if self.spec.kind == "uniform":
            return self._rng.random(shape, np.float32)
        # -log(Exp(1)) is Gumbel(0, 1). An exact 0 would become infinite.
        drawn = self._rng.standard_exponential(shape, np.float32)
        np.maximum(drawn, np.finfo(np.float32).tiny, out=drawn)
        np.log(drawn, out=drawn)
        return np.negative(drawn, out=drawn)


class OnnxPolicy:
    """A loaded policy file, immutable but for its noise: one thread at a time calls ``act``.

    ::

        policy = OnnxPolicy(Path("policy.onnx").read_bytes())
        actions, env_actions, outputs = policy.act({"": observations}, greedy)

    Attributes:
        spec: What the file says of itself.
        noise: Where its random numbers come from.

    Args:
        model: The file's bytes; not kept.
        noise: Where random numbers come from; a pool of its own if None.

    Raises:
        PolicyFileError: It is no policy file, or damaged.
    """

    def __init__(self, model: bytes, noise: NoisePool | None = None) -> None:
        options = onnxruntime.SessionOptions()
        # A batch is a few microseconds of work: handing it to other threads costs more than that.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common base but Exception
            raise PolicyFileError(f"onnxruntime cannot load the policy: {error}") from error
        self.spec = spec = PolicySpec.from_metadata(
            session.get_modelmeta().custom_metadata_map or {}
        )
        if spec.states:
            raise PolicyFileError("the policy is recurrent, which this release cannot run")
        self._session = session
        # Without the checks of its Python wrapper, where there is one: they cost as much as a small
        # network, and what is fed here has been checked.
        self._run = getattr(session, "_sess", session).run
        self.noise = NoisePool(spec.noise) if noise is None else noise
        self._noise_input = spec.noise.input
        self._inputs = tuple((each.path, each.name, np.dtype(each.dtype)) for each in spec.inputs)
        actions = spec.roles["actions"]
        env_actions = spec.roles.get("env_actions", actions)
        self._env_differs = env_actions != actions
        self._fetched = [actions, *([env_actions] if self._env_differs else [])]
        self._first_output = len(self._fetched)
        self._fetched += [spec.roles[role] for role in spec.recorded]
        self._recorded = spec.recorded

    @property
    def version(self) -> int:
        """RLlib's weights sequence number."""
        return self.spec.version

    def act(
        self, observations: Columns, greedy: NDArray[np.bool_]
    ) -> tuple[Columns, Columns, dict[str, NDArray[Any]]]:
        """Choose an action for each row.

        Args:
            observations: Raw, by leaf, ``[N, ...]``; not changed.
            greedy: ``[N]``; take the likeliest action instead of sampling.

        Returns:
            Three sets of columns ``[N, ...]``: the actions that are learnt from, those that the
            application executes (perhaps the same), and the recorded outputs by role.
        """
        feeds: dict[str, NDArray[Any]] = {self._noise_input: self.noise.take(greedy)}
        for path, name, dtype in self._inputs:
            column = observations[path]
            feeds[name] = column if column.dtype == dtype else column.astype(dtype)
        fetched = self._run(self._fetched, feeds, None)
        actions = {"": fetched[0]}
        env_actions = {"": fetched[1]} if self._env_differs else actions
        outputs = dict(zip(self._recorded, fetched[self._first_output :], strict=True))
        return actions, env_actions, outputs

    def bind(self, n: int) -> BoundPolicy:
        """The same policy for batches of exactly ``n`` rows, one after the other."""
        zeros = {
            path: np.zeros((n, *each.shape), dtype)
            for each, (path, _, dtype) in zip(self.spec.inputs, self._inputs, strict=True)
        }
        answer = self.act(zeros, np.ones(n, np.bool_))
        actions, env_actions, outputs = answer
        fetched = [actions[""], *([env_actions[""]] if self._env_differs else [])]
        fetched += [outputs[role] for role in self._recorded]
        noise = np.zeros((n, self.spec.noise.size), np.float32)
        binding = self._session.io_binding()
        for name, place in [
            (self._noise_input, noise),
            *((name, zeros[path]) for path, name, _ in self._inputs),
        ]:
            binding.bind_input(name, "cpu", 0, place.dtype.type, place.shape, place.ctypes.data)
        for name, place in zip(self._fetched, fetched, strict=True):
            binding.bind_output(name, "cpu", 0, place.dtype.type, place.shape, place.ctypes.data)
        run = functools.partial(self._session.run_with_iobinding, binding)
        return BoundPolicy(run, zeros, noise, self.noise, answer)

    def run(
        self, observations: Columns, noise: NDArray[np.float32], roles: tuple[str, ...]
    ) -> tuple[NDArray[Any], ...]:
        """Outputs of the graph for noise of the caller's own; for checks and tools.

        Args:
            observations: As for ``act``.
            noise: ``[N, size]``.
            roles: Which outputs, by role.
        """
        feeds: dict[str, NDArray[Any]] = {self._noise_input: noise}
        for path, name, dtype in self._inputs:
            feeds[name] = observations[path].astype(dtype, copy=False)
        return tuple(self._run([self.spec.roles[role] for role in roles], feeds, None))


class BoundPolicy:
    """A policy whose inputs and outputs keep their places in memory; made by ``OnnxPolicy.bind``.

    A small batch takes little more than half the time of ``OnnxPolicy.act``: nothing is looked up
    by name, and nothing allocated. One thread at a time.
    """

    def __init__(
        self,
        run: Callable[[], None],
        observations: Columns,
        noise: NDArray[np.float32],
        pool: NoisePool,
        answer: tuple[Columns, Columns, dict[str, NDArray[Any]]],
    ) -> None:
        """What it works with; the arrays are its own from here on.

        Args:
            run: Computes ``answer`` from ``observations`` and ``noise``.
            observations: By leaf, ``[N, ...]``.
            noise: ``[N, size]``.
            pool: Where the noise comes from.
            answer: As ``OnnxPolicy.act`` returns it.
        """
        self._run = run
        self._places = tuple(observations.items())
        self._noise = noise
        self._pool = pool
        self._answer = answer

    def act(
        self, observations: Columns, greedy: NDArray[np.bool_]
    ) -> tuple[Columns, Columns, dict[str, NDArray[Any]]]:
        """As ``OnnxPolicy.act``, for N rows. The next call overwrites what this one returned."""
        for path, place in self._places:
            place[...] = observations[path]
        self._noise[...] = self._pool.take(greedy)
        self._run()
        return self._answer
