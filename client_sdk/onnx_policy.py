"""``OnnxPolicy``: one version of a policy as a complete ONNX file, loaded and run.

The policy server runs its batches through this class too, so there is one graph and one way to run
it. Needs numpy and onnxruntime, nothing else. One thread at a time. N is the number of rows.

The graph maps observations and noise to actions; it draws no random numbers itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from client_sdk.noise_pool import NoisePool
from client_sdk.policy_spec import PolicyFileError, PolicySpec

Columns: TypeAlias = dict[str, NDArray[Any]]


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
        # As above, without the wrappers.
        session = getattr(self._session, "_sess", self._session)
        run = functools.partial(
            session.run_with_iobinding, getattr(binding, "_iobinding", binding), None
        )
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

    A small batch takes about two thirds of the time of ``OnnxPolicy.act``: nothing is looked up by
    name, and nothing allocated. One thread at a time.
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
