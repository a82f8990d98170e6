"""``StepMessages``: the ``DriveRequest`` and ``DriveResponse`` of a step, written and read.

Both ends of a ``Drive`` use it. Immutable once built; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Buffer, Columns, Reader, SpaceCodec
from client_sdk.wire.layouts import FixedLayout

_MOST_BYTES = 4 * 1024 * 1024
"""Of values. Larger messages are better not copied for each leaf, and building them is cheap beside
sending them."""


class Stepped(NamedTuple):
    """What a step of n environments gave."""

    observations: Columns
    rewards: Sequence[float]
    terminated: Sequence[bool]
    truncated: Sequence[bool]
    infos: Sequence[Struct] = ()
    """One for each environment, or none."""


OneStep = tuple[Any, float, bool, bool, dict[str, Any]]
"""What a step of one environment gave, as Gymnasium tells it."""


class StepMessages:
    """Steps of the n environments of one handle.

    Where the spaces allow it, bytes go straight into messages and are found in them by their place
    (``FixedLayout``). It is for protobuf to read what has ``infos``, or comes from a peer that lays
    its messages out in another way.

    Where n is 1, the methods with ``one`` in their names do the same with values instead of columns,
    in a fraction of the time; what they answer with None is for those without.
    """

    def __init__(self, handle: str, observations: SpaceCodec, actions: SpaceCodec, n: int) -> None:
        self.handle = handle
        self._observations = observations
        self._actions = actions
        self._n = n
        self._doubles = struct.Struct(f"<{n}d")
        self._flags = struct.Struct(f"<{n}?")
        self._request = self._request_layout()
        self._answer = self._answer_layout()
        if self._answer is not None:
            *places, rewards, terminated, truncated = self._answer.offsets
            gaps = terminated - rewards - 8 * n, truncated - terminated - n
            self._ends_in = struct.Struct(
                f"<{rewards}x{n}d{gaps[0]}x{n}?{gaps[1]}x{n}?"  # in the order of their numbers
            ).unpack_from
            self._observations_in = observations.columns_in(places, n)
            self._observation_in = observations.reader(places)
        if self._request is not None:
            self._actions_in = actions.columns_in(self._request.offsets, n)
        self._plain_observation: Callable[[Any], Buffer | None] = _no_leaf
        self._plain_action: Callable[[Any], Buffer | None] = _no_leaf
        self._action_in: Reader = _no_leaf
        if n == 1:
            if self._answer is not None and (leaf := observations.sole_leaf) is not None:
                self._plain_observation = leaf.plain
            if self._request is not None and (leaf := actions.sole_leaf) is not None:
                self._plain_action = leaf.plain
                self._action_in = leaf.sure_reader(self._request.offsets[0])

    def _request_layout(self) -> FixedLayout | None:
        codec, n = self._actions, self._n
        if not _suits(codec, n):
            return None
        specimens = map(self._request_message, codec.specimens(n))
        return _layout(specimens, codec.byte_sizes(n))

    def _answer_layout(self) -> FixedLayout | None:
        codec, n = self._observations, self._n
        if not _suits(codec, n):
            return None
        zeros, *others = codec.specimens(n)
        zero, one, no, yes = [0.0] * n, _all_bits(n), [False] * n, [True] * n
        steps = [
            *(Stepped(columns, zero, no, no) for columns in (zeros, *others)),
            Stepped(zeros, one, no, no),
            Stepped(zeros, zero, yes, no),
            Stepped(zeros, zero, no, yes),
        ]
        return _layout(map(self._answer_message, steps), [*codec.byte_sizes(n), 8 * n, n, n])

    # -- the client's end

    def request(self, actions: Columns) -> bytes:
        """The serialized request for a step with these actions: columns of the codec."""
        if self._request is not None:
            return self._request.join(self._actions.buffers(actions))
        return self._request_message(actions).SerializeToString()

    def one_request(self, action: Any) -> bytes | None:
        """Likewise; None: it is for ``request``, or no value of the space."""
        data = self._plain_action(action)
        return None if data is None or self._request is None else self._request.join((data,))

    def _request_message(self, actions: Columns) -> pb.DriveRequest:
        request = pb.DriveRequest()
        request.step.env_handle = self.handle
        self._actions.encode(actions, request.step.actions)
        return request

    def read_answer(self, data: bytes) -> Stepped | None:
        """What is in an answer; None: it must be parsed, and may be no ``StepResponse`` at all."""
        if self._answer is None or not self._answer.fits(data):
            return None
        n, ends = self._n, self._ends_in(data)
        return Stepped(self._observations_in(data), ends[:n], ends[n : 2 * n], ends[2 * n :])

    def read_one_answer(self, data: bytes) -> OneStep | None:
        """Likewise."""
        if self._answer is None or not self._answer.fits(data):
            return None
        reward, terminated, truncated = self._ends_in(data)
        return self._observation_in(data), reward, terminated, truncated, {}

    def parsed(self, response: pb.StepResponse) -> Stepped:
        """What is in an answer.

        Raises:
            Fault: The observations are not of the space.
        """
        return Stepped(
            self._observations.decode(response.observations, self._n, "observations"),
            response.rewards,
            response.terminated,
            response.truncated,
            response.infos,
        )

    # -- the host's end

    def read_request(self, data: bytes) -> Columns | None:
        """The actions in a request; None: it must be parsed, and may be no step at all."""
        if self._request is None or not self._request.fits(data):
            return None
        return self._actions_in(data)

    def read_one_request(self, data: bytes) -> Any | None:
        """Likewise; None also where it is to be seen whether the space has that action."""
        if self._request is None or not self._request.fits(data):
            return None
        return self._action_in(data)

    def answer(self, step: Stepped) -> bytes:
        """The serialized answer with what a step gave, its observations columns of the codec."""
        if self._answer is None or step.infos:
            return self._answer_message(step).SerializeToString()
        observations, rewards, terminated, truncated, _ = step
        buffers, pack = self._observations.buffers(observations), self._flags.pack
        return self._answer.join(
            [*buffers, self._doubles.pack(*rewards), pack(*terminated), pack(*truncated)]
        )

    def one_answer(self, step: OneStep) -> bytes | None:
        """Likewise; None: it is for ``answer``, or no observation of the space."""
        observation, reward, terminated, truncated, info = step
        data = None if info else self._plain_observation(observation)
        if data is None or self._answer is None:
            return None
        pack = self._flags.pack
        return self._answer.join(
            (data, self._doubles.pack(reward), pack(terminated), pack(truncated))
        )

    def _answer_message(self, step: Stepped) -> pb.DriveResponse:
        response = pb.DriveResponse()
        self.fill(response.step, step)
        return response

    def fill(self, response: pb.StepResponse, step: Stepped) -> None:
        """Write what a step gave into an empty message."""
        self._observations.encode(step.observations, response.observations)
        response.rewards.extend(step.rewards)
        response.terminated.extend(step.terminated)
        response.truncated.extend(step.truncated)
        response.infos.extend(step.infos)


def _no_leaf(_value: Any) -> Any:
    """Where a value is no single column, or not all of a message: None."""
    return None


def _suits(codec: SpaceCodec, n: int) -> bool:
    return codec.is_plain and sum(codec.byte_sizes(n)) <= _MOST_BYTES


def _all_bits(n: int) -> Sequence[float]:
    return struct.unpack(f"<{n}d", b"\xff" * 8 * n)


def _layout(specimens: Iterable[Message], sizes: Sequence[int]) -> FixedLayout | None:
    """None: these messages have to be built and parsed."""
    message, *variants = specimens
    try:
        return FixedLayout(message, variants, sizes)
    except ValueError:  # there is an empty leaf
        return None
