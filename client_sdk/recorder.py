"""``Recording``: the steps of local inference as columns, cut into chunks for ``UploadEpisodes``.

No I/O. Owned by one client, touched by one of its calls at a time; what is cut belongs to whoever
takes it.

N episodes step together (one, or the rows of a vector environment); T is the steps of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from client_sdk.chunks import CutChunk, Lineage
from client_sdk.errors import LimitExceededError
from client_sdk.rows import EpisodeOptions, Status
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.tensors import tensor_to_proto

_FIRST_CAPACITY: Final = 32
_BLOCK_BYTES: Final = 16 * 2**20
"""A recording's observations take about so much memory at most."""
_CHUNK_BYTES: Final = 4 * 2**20
"""So do those of a chunk."""
_ENVELOPE_BYTES: Final = 4096
"""Of a chunk and its request beside the columns."""
_COLUMN_BYTES: Final = 64
"""Per step, for what is neither observation nor action output."""


class PolicyFile(Protocol):
    """What a chunk says of the policy that chose its actions."""

    policy_id: str
    version: int
    sha256: bytes


@dataclasses.dataclass(frozen=True)
class ChunkFormat:
    """What the chunks of a session have in common."""

    observations: SpaceCodec
    max_message_bytes: int
    """0: no limit was named."""
    max_request_steps: int
    """0: no limit was named."""

    def max_steps(self, n: int) -> int:
        """Of a chunk where N episodes are recorded together.

        Raises:
            LimitExceededError: Not even one step fits the server's limit.
        """
        row = sum(self.observations.byte_sizes(1))
        steps = max(1, min(_BLOCK_BYTES // n, _CHUNK_BYTES) // max(row, 1) - 1)
        if self.max_request_steps:
            steps = min(steps, self.max_request_steps)
        if self.max_message_bytes:
            fits = (self.max_message_bytes - _ENVELOPE_BYTES - row) // (row + _COLUMN_BYTES)
            if fits < 1:
                raise LimitExceededError(
                    f"a step with its two observations of {row} bytes each does not fit into the "
                    f"server's limit of {self.max_message_bytes} bytes "
                    "(PolicyServerConfig.max_message_bytes). Raise it, or send smaller "
                    "observations."
                )
            steps = min(steps, fits)
        return steps


class Recording:
    """The steps of N episodes, column by column and time by time, until they are cut.

    ::

        recording.observe(columns, rewards)             # where they are now
        chunks = recording.cut()                        # if it is time, or the policy has changed
        recording.acted(policy, actions, outputs)       # and so on
        chunk = recording.end(row, Status.TERMINATED)   # after the final observation

    A step is whole, and can be cut, once the observation after it is known.

    Attributes:
        n: N.
        options: Of all of its episodes.
        trains: Whether the learner sees them.
        greedy: [N] Whether they take the likeliest action: all or none.
        awaiting: The latest observation has no action yet.
        policy: That chose the latest actions; None before the first.
        begins: [N] The next observation is the first of an episode.
    """

    def __init__(self, form: ChunkFormat, n: int, options: EpisodeOptions) -> None:
        self.n = n
        self.options = options
        self.trains = options.trains
        self.greedy = np.full(n, not options.explore)
        self.awaiting = False
        self.policy: PolicyFile | None = None
        self.begins: NDArray[np.bool_] = np.ones(n, np.bool_)
        self._any_begins = True
        self._form = form
        self._max_steps = form.max_steps(n)
        self._capacity = min(_FIRST_CAPACITY, self._max_steps + 1)
        self._count = 0
        self._latest: Columns = {}
        codec = form.observations
        self._observations = [
            (path, np.empty((self._capacity, n, *codec.leaf(path).shape), codec.leaf(path).dtype))
            for path in codec.paths
        ]
        self._rewards: NDArray[np.float64] = np.zeros((self._capacity, n))
        self._actions: list[tuple[str, NDArray[Any]]] = []
        self._outputs: list[tuple[str, NDArray[Any]]] = []
        self._logged = False
        # By row: the index of its first observation here, that step's number, and its episode.
        self._starts = [0] * n
        self._first_steps = [0] * n
        self._lineages = [Lineage(options) for _ in range(n)]

    @property
    def whole_steps(self) -> int:
        """Of all rows, at most: what ``cut`` would cut."""
        return max(self._count - 1, 0) * self.n

    @property
    def full(self) -> bool:
        """It has to be cut before the next action."""
        return self._count > self._max_steps

    def observe(self, columns: Columns, rewards: Any) -> None:
        """Note where the episodes are, and what the actions before have earned.

        Args:
            columns: [N] observations; copied.
            rewards: [N], or one number for all; of rows that begin, nobody's.
        """
        i = self._count
        if i == self._capacity:
            self._grow()
        latest = self._latest
        for path, block in self._observations:
            latest[path] = row = block[i]
            row[...] = columns[path]
        if i:
            self._rewards[i - 1] = rewards
        self._count = i + 1
        self.awaiting = True
        if self._any_begins:
            self._any_begins = False
            self.begins[:] = False

    def observe_again(self, rewards: float) -> None:
        """Likewise, where the last observation stands in for one that nobody made."""
        last = self._count - 1
        self.observe({path: block[last] for path, block in self._observations}, rewards)

    def latest(self) -> Columns:
        """[N] The latest observations: a view."""
        return self._latest

    def continues(self, policy: PolicyFile, *, logged: bool) -> bool:
        """Whether an action of that policy, or of the application, belongs into the same chunk."""
        return self.policy is policy and self._logged is logged

    def acted(
        self,
        policy: PolicyFile,
        actions: Columns,
        outputs: dict[str, NDArray[Any]],
        *,
        logged: bool = False,
    ) -> None:
        """Note what was done there.

        Args:
            policy: That chose the actions, or would have.
            actions: [N], as the graph gave them; or as the application executed them.
            outputs: [N], the graph's recorded ones.
            logged: The application chose.
        """
        i = self._count - 1
        if policy is not self.policy or logged is not self._logged:
            self._actions = self._blocks_for(actions)
            self._outputs = self._blocks_for(outputs)
            self.policy, self._logged = policy, logged
        for path, block in self._actions:
            block[i] = actions[path]
        for name, block in self._outputs:
            block[i] = outputs[name]
        self.awaiting = False

    def cut(self) -> list[CutChunk]:
        """Cut all whole steps; what is not whole yet stays."""
        last = self._count - 1
        if last < 1:
            return []
        chunks = [
            self._chunk(row, Status.RUNNING) for row in range(self.n) if self._starts[row] < last
        ]
        for _, block in (*self._observations, *self._actions, *self._outputs):
            block[0] = block[last]
        for row, start in enumerate(self._starts):
            self._first_steps[row] += max(last - start, 0)
            self._starts[row] = max(start - last, 0)
        self._count = 1
        return chunks

    def end(self, row: int, status: Status) -> CutChunk | None:
        """Cut the rest of a row whose final observation was the latest; another episode follows.

        Returns:
            None: the episode had no step.
        """
        chunk = self._chunk(row, status) if self._starts[row] < self._count - 1 else None
        self._begin(row, self._count)
        return chunk

    def clear(self) -> None:
        """Forget everything but the memory for it, once all rows have ended: others may begin."""
        self._count = 0
        self._starts = [0] * self.n
        self.awaiting = False

    def abandon(self, row: int) -> CutChunk | None:
        """Give up a row's episode; its next observation begins another.

        Returns:
            What takes back the part that was cut before; None: nothing was.
        """
        lineage, first = self._lineages[row], self._first_steps[row]
        self._begin(row, self._count)
        if not lineage.cut:
            return None
        chunk = pb.Chunk(first_step=first, status=pb.STEP_STATUS_ABANDONED)
        tensor_to_proto(self._rewards[:0, row], chunk.rewards)
        self._name(chunk)
        return CutChunk(lineage, 0, first, Status.ABANDONED, chunk.SerializeToString())

    def _begin(self, row: int, start: int) -> None:
        self._starts[row] = start
        self._first_steps[row] = 0
        self._lineages[row] = Lineage(self.options)
        self.begins[row] = True
        self._any_begins = True

    def _chunk(self, row: int, status: Status) -> CutChunk:
        """The steps of a row up to the latest observation."""
        start, last, lineage = self._starts[row], self._count - 1, self._lineages[row]
        first = self._first_steps[row]
        chunk = pb.Chunk(first_step=first, status=int(status), logged=self._logged)  # type: ignore[arg-type]
        self._name(chunk)
        self._form.observations.encode(
            {path: block[start : last + 1, row] for path, block in self._observations},
            chunk.observations,
        )
        for path, block in self._actions:
            tensor_to_proto(block[start:last, row], chunk.actions.leaves[path])
        for name, block in self._outputs:
            tensor_to_proto(block[start:last, row], chunk.outputs[name])
        tensor_to_proto(self._rewards[start:last, row], chunk.rewards)
        lineage.cut = True
        return CutChunk(lineage, last - start, first, status, chunk.SerializeToString())

    def _name(self, chunk: pb.Chunk) -> None:
        policy = self.policy
        if policy is not None:
            chunk.policy_id = policy.policy_id
            chunk.policy_version = policy.version
            chunk.policy_sha256 = policy.sha256

    def _blocks_for(self, columns: dict[str, NDArray[Any]]) -> list[tuple[str, NDArray[Any]]]:
        return [
            (name, np.empty((self._capacity, *column.shape), column.dtype))
            for name, column in columns.items()
        ]

    def _grow(self) -> None:
        self._capacity = min(2 * self._capacity, self._max_steps + 1)

        def grown(blocks: Sequence[tuple[str, NDArray[Any]]]) -> list[tuple[str, NDArray[Any]]]:
            return [(name, self._larger(block)) for name, block in blocks]

        self._observations = grown(self._observations)
        self._actions, self._outputs = grown(self._actions), grown(self._outputs)
        self._rewards = self._larger(self._rewards)

    def _larger(self, block: NDArray[Any]) -> NDArray[Any]:
        larger = np.empty((self._capacity, *block.shape[1:]), block.dtype)
        larger[: len(block)] = block
        return larger
