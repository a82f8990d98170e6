"""One uploaded ``Chunk`` to checked columns, or to the fault that refuses it.

Loop thread only. Nothing is recorded here. T is the chunk's number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaf_kinds import FLOAT32_MAX
from client_sdk.wire.tensors import DTYPES
from client_sdk.wire.trees import tree_of
from policy_server.actions import LOGP, LoggedActions
from policy_server.experience import InferredBatch
from policy_server.masks import mask_path, nothing_allowed
from policy_server.policy_check import PolicyCheck
from policy_server.refusals import check_policy_id, logp_required, unknown_agent
from policy_server.terms import Terms
from policy_server.tracks import ABANDONED, RUNNING, UploadedSteps

if TYPE_CHECKING:
    from client_sdk.onnx_policy import OnnxPolicy
    from policy_server.policy_files import PolicyFile, PolicyFiles

_SHA256_BYTES = 32


class ChunkReader:
    """Knows the spaces and the policy files, and what a chunk may be."""

    def __init__(self, terms: Terms, files: PolicyFiles) -> None:
        self._files = files
        self._observations = SpaceCodec(terms.observation_space)
        self._action_space = terms.action_space
        self._executed = SpaceCodec(terms.action_space)
        self._logged = LoggedActions(terms.action_space, normalize=terms.normalize_actions)
        self._mask = mask_path(terms.observation_space, terms.action_space)
        self._need_logp = terms.logged_actions_need_logp
        self._check = PolicyCheck(terms.action_space)
        self._rewards = _Column("reward", (), np.float64)
        # Of the graph; known with the first file, and the same for all of them.
        self._actions: SpaceCodec | None = None
        self._outputs: dict[str, _Column] = {}

    def read(self, chunk: pb.Chunk, field: str, *, training: bool) -> UploadedSteps:
        """Check a chunk.

        Args:
            chunk: From anyone; nothing about it is taken for granted.
            field: Path to it.
            training: Its steps are to be learnt from.

        Raises:
            Fault: What is wrong with it.
        """
        _check_names(chunk, field)
        status = chunk.status or RUNNING
        if status == ABANDONED and not chunk.HasField("rewards"):
            return UploadedSteps([], ABANDONED, logged=False)
        steps = steps_of(chunk)
        rewards = self._rewards.decode(chunk.rewards, steps, f"{field}.rewards")
        read = UploadedSteps(rewards.tolist(), int(status), logged=chunk.logged)
        if status == ABANDONED:
            return read  # nobody will look at the rest
        if not steps:
            raise Fault(
                Reason.MALFORMED_TENSOR,
                "expected at least one step, got none; only an ABANDONED chunk may be empty",
                f"{field}.rewards",
            )
        _check_consecutive(chunk, steps, field)
        observations = self._decode_observations(chunk, steps, field)
        file = self._file(chunk, field)
        self._learn_outputs()
        decode = self._decode_logged if chunk.logged else self._decode_chosen
        batch = decode(
            chunk,
            {path: column[:steps] for path, column in observations.items()},
            steps,
            file,
            field,
            training,
        )
        read.batch = batch
        read.last_observation = {path: column[steps:] for path, column in observations.items()}
        return read

    def _decode_observations(self, chunk: pb.Chunk, steps: int, field: str) -> Columns:
        field = f"{field}.observations"
        columns = self._observations.decode(chunk.observations, steps + 1, field)
        _raise_first(self._observations.row_faults(columns, field))
        if self._mask is not None:
            none = np.flatnonzero(~columns[self._mask][:steps].any(axis=1))
            if len(none):
                raise nothing_allowed(f'{field}["{self._mask}"][{none[0]}]')
        return columns

    def _file(self, chunk: pb.Chunk, field: str) -> PolicyFile:
        files = self._files
        sha256 = chunk.policy_sha256
        newest = files.newest
        if newest is None:  # uploads wait for the first one
            raise TypeError("no policy has been published")
        if chunk.logged and not sha256:
            return newest
        file = files.find(sha256)
        if file is not None:
            return file
        if len(sha256) != _SHA256_BYTES:
            raise Fault(
                Reason.UNKNOWN_POLICY,
                f"expected the {_SHA256_BYTES} bytes of a SHA-256, got {len(sha256)}; it is in "
                "the PolicyHeader of GetPolicy",
                f"{field}.policy_sha256",
            )
        if chunk.policy_version <= files.forgotten_version:
            raise Fault(
                Reason.STALE_POLICY,
                f"version {chunk.policy_version} is too old to learn from: files up to version "
                f"{files.forgotten_version} are no longer remembered (policies_remembered), the "
                f"newest is {newest.version}. Take newer policies, and upload more often; or the "
                "file is another server's, from before a restart",
                f"{field}.policy_sha256",
            )
        raise Fault(
            Reason.UNKNOWN_POLICY,
            "this server process has published no such file: it is another server's, from before "
            f"a restart, or the hash is wrong (version {chunk.policy_version} was named, the "
            f"newest is {newest.version}). Download the policy again (GetPolicy)",
            f"{field}.policy_sha256",
        )

    def _learn_outputs(self) -> None:
        """See from the first file what graphs give."""
        newest = self._files.newest
        if self._actions is not None or newest is None or newest.exported is None:
            return
        policy = newest.exported.onnx
        roles = ("actions", *policy.spec.recorded)
        actions, *outputs = self._run(policy, self._observations.zeros(1), roles)
        self._actions = SpaceCodec(_module_space(self._action_space, actions))
        self._outputs = {
            role: _Column(role, output.shape[1:], output.dtype)
            for role, output in zip(policy.spec.recorded, outputs, strict=True)
        }

    @staticmethod
    def _run(
        policy: OnnxPolicy, observations: Columns, roles: tuple[str, ...]
    ) -> tuple[NDArray[Any], ...]:
        n = len(next(iter(observations.values())))
        noise = policy.spec.noise
        return policy.run(observations, np.full((n, noise.size), noise.greedy, np.float32), roles)

    def _decode_chosen(
        self,
        chunk: pb.Chunk,
        observations: Columns,
        steps: int,
        file: PolicyFile,
        field: str,
        training: bool,
    ) -> InferredBatch:
        codec = self._actions
        if codec is None:  # there is a file, so it was looked at
            raise TypeError("no graph has been looked at")
        actions = codec.decode(chunk.actions, steps, f"{field}.actions")
        _raise_first(codec.row_faults(actions, f"{field}.actions"))
        outputs = {
            role: column.decode_output(chunk.outputs, steps, field)
            for role, column in self._outputs.items()
        }
        if training and file.exported is not None:
            self._check.check(file.exported.onnx, observations, actions[""], outputs, field)
        return InferredBatch(file, observations, actions, {}, outputs)

    def _decode_logged(
        self,
        chunk: pb.Chunk,
        observations: Columns,
        steps: int,
        file: PolicyFile,
        field: str,
        training: bool,
    ) -> InferredBatch:
        actions = self._executed.decode(chunk.actions, steps, f"{field}.actions")
        _raise_first(self._executed.row_faults(actions, f"{field}.actions", bounds=True))
        logps = None
        if LOGP in chunk.outputs:
            column = _Column(LOGP, (), np.float64)
            logps = column.decode_output(chunk.outputs, steps, field)
        elif self._need_logp:
            raise logp_required(f'{field}.outputs["{LOGP}"]')
        outputs: dict[str, NDArray[Any]] = {}
        if training and self._outputs:
            if file.exported is None:
                raise Fault(
                    Reason.STALE_POLICY,
                    f"version {file.version} is too old to say what it would have done: its file "
                    "is no longer kept (policies_kept). Name the newest policy for logged actions",
                    f"{field}.policy_sha256",
                )
            roles = tuple(self._outputs)
            found = self._run(file.exported.onnx, observations, roles)
            outputs = dict(zip(roles, found, strict=True))
            for role, values in outputs.items():
                if not np.isfinite(values).all():
                    raise Fault(
                        Reason.NOT_FINITE,
                        f"the policy's {role} for these observations are not finite. Check the "
                        "simulator, or scale what it observes",
                        f"{field}.observations",
                    )
        batch = InferredBatch(file, observations, {}, {}, outputs)
        return self._logged.substitute(batch, actions, logps)


class _Column:
    """A tensor ``[T, *shape]`` of finite numbers."""

    def __init__(self, what: str, shape: tuple[int, ...], dtype: Any) -> None:
        self._what = what
        (self._leaf,) = tree_of(gym.spaces.Box(-np.inf, np.inf, shape, dtype)).leaves()

    def decode(self, tensor: pb.Tensor, steps: int, field: str) -> NDArray[Any]:
        values = self._leaf.decode(tensor, steps, field)
        # NaN compares as false.
        if not (np.abs(values) <= FLOAT32_MAX).all():
            at = np.argwhere(~(np.abs(values) <= FLOAT32_MAX))[0].tolist()
            raise Fault(
                Reason.NOT_FINITE,
                f"expected a {self._what} that is finite in float32, got {values[tuple(at)]}",
                field + "".join(f"[{i}]" for i in at),
            )
        return values

    def decode_output(
        self, outputs: Mapping[str, pb.Tensor], steps: int, field: str
    ) -> NDArray[Any]:
        field = f'{field}.outputs["{self._what}"]'
        if self._what not in outputs:
            raise Fault(
                Reason.SPACE_MISMATCH,
                f"expected the graph's output {self._what}, got "
                f"{', '.join(f'{name:.80}' for name in sorted(outputs)[:8]) or 'none'}; the metadata of the policy file "
                "names what to record",
                field,
            )
        return self.decode(outputs[self._what], steps, field)


def steps_of(chunk: pb.Chunk) -> int:
    """T, as the bytes of the rewards have it: what a tensor says of its shape may be a lie."""
    dtype = DTYPES.get(chunk.rewards.dtype)
    return 0 if dtype is None else len(chunk.rewards.data) // dtype.itemsize


def _module_space(space: gym.Space[Any], actions: NDArray[Any]) -> gym.Space[Any]:
    """Of the graph's own actions, which count from 0 and are not scaled to the space."""
    if isinstance(space, gym.spaces.Discrete):
        return gym.spaces.Discrete(int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return gym.spaces.MultiDiscrete(space.nvec, dtype=actions.dtype.type)
    return gym.spaces.Box(-np.inf, np.inf, actions.shape[1:], actions.dtype.type)


def _check_names(chunk: pb.Chunk, field: str) -> None:
    if chunk.agent != "":
        raise unknown_agent(chunk.agent, f"{field}.agent")
    check_policy_id(chunk.policy_id, f"{field}.policy_id")
    if not 0 <= chunk.status <= ABANDONED:
        raise Fault(
            Reason.MALFORMED_TENSOR,
            f"expected a StepStatus from 0 to {ABANDONED}, got {chunk.status}",
            f"{field}.status",
        )


def _check_consecutive(chunk: pb.Chunk, steps: int, field: str) -> None:
    env_steps = chunk.env_steps
    if not env_steps:
        return
    if len(env_steps) != steps + 1:
        raise Fault(
            Reason.MALFORMED_TENSOR,
            f"expected {steps + 1} entries, one per observation, or none, got {len(env_steps)}",
            f"{field}.env_steps",
        )
    if list(env_steps) != list(range(env_steps[0], env_steps[0] + steps + 1)):
        raise Fault(
            Reason.STEP_OUT_OF_ORDER,
            "expected consecutive steps: the only agent takes part in every one",
            f"{field}.env_steps",
        )


def _raise_first(faults: Mapping[int, Fault]) -> None:
    if faults:
        row = min(faults)
        fault = faults[row]
        raise Fault(fault.reason, f"row {row}: {fault.message}", fault.field)
