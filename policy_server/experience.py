"""Experience on its way from the server's loop to ``sample()``.

Everything here is made by the loop thread and handed over whole: after
``ExperienceBuffer.put`` the actor thread owns a chunk, and the loop keeps no reference to it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns


POLICY_ID = "default_policy"
"""Of the only policy of single-agent work, as RLlib calls it."""


class PolicyVersion(Protocol):
    """Which version of the policy experience was made with."""

    version: int


class Policy(PolicyVersion, Protocol):
    """One version of the policy: immutable once published, shared by all threads."""

    def infer(
        self, observations: Columns, greedy: NDArray[np.bool_], contexts: Sequence[RowContext]
    ) -> InferredBatch:
        """Choose an action for each row.

        Args:
            observations: Raw observations by leaf, each ``[N, ...]``.
            greedy: ``[N]``; take the likeliest action instead of sampling.
            contexts: ``[N]``; what the policy remembers of each row's agent.
        """
        ...


class RowContext:
    """What inference may keep of one agent between its steps. Loop thread only.

    Attributes:
        reward: Earned since the agent's previous action; set before each inference.
        logged: Row of a batch with what the application did instead of the last action chosen;
            None where it did as it was told.
        memory: The engine's own (recurrent state, a shadow episode); None at the first step.
    """

    __slots__ = ("logged", "memory", "reward")

    def __init__(self) -> None:
        self.reward = 0.0
        self.logged: tuple[InferredBatch, int] | None = None
        self.memory: Any = None


class InferredBatch:
    """The rows of one inference, kept as columns. Rows of it are recorded by reference.

    Attributes:
        policy: The version that chose the actions.
        observations: What it saw, raw, by leaf: ``[N, ...]``.
        actions: As the module gave them, by leaf of the action space: ``[N, ...]``; what is learnt
            from.
        env_actions: As the application executes them (unsquashed, clipped, shifted).
        outputs: Further outputs by name, each ``[N, ...]``: ``action_logp``,
            ``action_dist_inputs``; nested ones with "/": ``state_out/h``.
    """

    __slots__ = ("actions", "env_actions", "observations", "outputs", "policy")

    def __init__(
        self,
        policy: PolicyVersion,
        observations: Columns,
        actions: Columns,
        env_actions: Columns,
        outputs: dict[str, NDArray[Any]],
    ) -> None:
        self.policy = policy
        self.observations = observations
        self.actions = actions
        self.env_actions = env_actions
        self.outputs = outputs


class Deliveries:
    """Up to which number a client's uploads have reached the learner; safe from any thread.

    The loop takes uploads in the order of their numbers, the actor thread settles them in any.
    """

    __slots__ = ("_lock", "_taken", "_unsettled")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        self._unsettled: dict[int, None] = {}  # a set in order

    def take(self, sequence: int) -> Receipt:
        """The next upload is here; what it comes to is told to the receipt."""
        with self._lock:
            self._taken = sequence
            self._unsettled[sequence] = None
        return Receipt(self, [sequence])

    def settle(self, sequences: Sequence[int]) -> None:
        """Handed to the learner or discarded."""
        with self._lock:
            for sequence in sequences:
                self._unsettled.pop(sequence, None)

    @property
    def through(self) -> int:
        """All uploads up to this number are settled."""
        with self._lock:
            first = next(iter(self._unsettled), None)
            return self._taken if first is None else first - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """What is owed to a client for uploads that became one chunk."""

    deliveries: Deliveries
    sequences: list[int]

    def settle(self) -> None:
        """The chunk was handed to the learner or discarded."""
        self.deliveries.settle(self.sequences)


class EpisodeIdentity:
    """Who an episode is for RLlib; one per running agent. Actor thread only, once a chunk is out.

    Attributes:
        label: The application's name for it; for logs only.
        memory: The hand-over's own: RLlib's id, ``t_started``, lookback. None at the first chunk.
    """

    __slots__ = ("label", "memory")

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.memory: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class EpisodeEnd:
    """What is reported of a finished episode."""

    episode_return: float
    """Sum of all rewards."""
    length: int
    """Steps taken, T."""
    duration_s: float
    """From the first row to the last, on the server's clock."""
    metrics: dict[str, float]
    """The application's own numbers."""
    reported: bool = True
    """False for one whose beginning is not known here, so that its return would mislead."""


@dataclasses.dataclass(slots=True)
class Chunk:
    """Consecutive steps of one agent under one policy version.

    ``T = len(rows)`` is at least 1, except where ``end`` alone is to be reported.
    """

    identity: EpisodeIdentity
    agent: str
    policy: PolicyVersion
    """Chose all its actions (or would have, for logged ones); the first of them where episodes
    must not be cut."""
    rows: list[tuple[InferredBatch, int]]
    """[T] Which row of which inference each step is."""
    rewards: list[float]
    """[T] Earned by each step's action."""
    last_observation: Columns
    """Where the last step led, by leaf: ``[1, ...]``; empty in evaluation."""
    first_step: int = 0
    """The agent's own count of steps at ``rows[0]``. A chunk that does not continue where the one
    before it stopped follows a loss, and must not be joined to it."""
    terminated: bool = False
    truncated: bool = False
    """True where the episode was cut off from outside; both False where it goes on."""
    logged: list[int] = dataclasses.field(default_factory=list)
    """Indices of steps that the application chose itself."""
    training: bool = True
    """False for evaluation: reported, never learnt from."""
    end: EpisodeEnd | None = None
    """Present in an episode's last chunk."""
    receipt: Receipt | None = None
    """For the client that uploaded it; given to the last part where a chunk is split."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rows)

    def settle(self) -> None:
        """Its steps were handed to the learner or discarded; settling twice is fine."""
        receipt, self.receipt = self.receipt, None
        if receipt is not None:
            receipt.settle()
