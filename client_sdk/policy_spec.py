"""``PolicySpec``: what a policy file says of itself, in the metadata of its ONNX model.

Everything that a program in any language must know to run the graph: its inputs, its noise, what its
outputs are. Immutable. N is the number of rows; letters beside it are the space's own dimensions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

SCHEMA_VERSION: Final = "1"
"""Of the metadata; a file of another schema is refused."""

_PREFIX: Final = "policyserver."

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
