"""Clients that act alone, with nothing but the contract and a policy file; quick to import."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Self

import grpc
import numpy as np

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.tensors import tensor_to_proto
from tests.server.talk import CALL_TIMEOUT_S, RUNNING, Talker, batch


class Downloaded:
    """What ``GetPolicy`` gave."""

    def __init__(self, parts: Iterator[pb.GetPolicyResponse]) -> None:
        self.header = next(parts).header
        self.pieces = [part.piece for part in parts]
        self.model = b"".join(self.pieces)

    def check(self) -> Downloaded:
        """A whole file, as the header says."""
        assert len(self.model) == self.header.size_bytes > 0
        assert hashlib.sha256(self.model).digest() == self.header.sha256
        return self


class Uploader(Talker):
    """A client that acts alone.

    Attributes:
        executed: What the application would have done in the chunk made last.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self.sequence = 0
        self.rng = np.random.default_rng(0)
        self.policy: Any = None
        self.sha256 = b""
        self.executed: Any = None
        super().__init__(address, **options)

    def open(self, **fields: Any) -> pb.OpenSessionResponse:
        return super().open(**{"inference_mode": pb.INFERENCE_MODE_LOCAL, **fields})

    def asking(
        self, have: bytes = b"", wait_s: float = 0.0, timeout: float = CALL_TIMEOUT_S, **fields: Any
    ) -> Any:
        """A GetPolicy call on its way."""
        request = pb.GetPolicyRequest(session_id=self.session_id, have_sha256=have, **fields)
        request.wait.FromMicroseconds(int(wait_s * 1e6))
        return self.stub.GetPolicy(request, timeout=timeout, metadata=self.metadata)

    def download(self, *have: Any, **fields: Any) -> Downloaded:
        """GetPolicy, to its end."""
        return Downloaded(self.asking(*have, **fields))

    def fly(self) -> Self:
        """Take the newest policy and act with it from now on."""
        got = self.download().check()
        self.policy = OnnxPolicy(got.model, NoisePool(OnnxPolicy(got.model).spec.noise, self.rng))
        self.sha256 = got.header.sha256
        return self

    def chunk(
        self,
        episode: int,
        first_step: int,
        observations: Any,
        rewards: Any = None,
        status: int = RUNNING,
        *,
        sequence: int | None = None,
        greedy: bool = False,
        **fields: Any,
    ) -> pb.Chunk:
        """T steps from T+1 observations, each worth 1 unless told; numbered in their order."""
        columns = observations if isinstance(observations, dict) else {"": np.asarray(observations)}
        steps = len(next(iter(columns.values()))) - 1
        if sequence is None:
            sequence = self.sequence = self.sequence + 1
        chunk = pb.Chunk(
            sequence=sequence,
            episode=episode,
            policy_version=self.policy.version,
            policy_sha256=self.sha256,
            first_step=first_step,
            status=status,
            rewards=tensor_to_proto(
                np.ones(steps) if rewards is None else np.asarray(rewards, np.float64)
            ),
        )
        chunk.observations.CopyFrom(batch(columns))
        if steps:
            acted = {path: column[:steps] for path, column in columns.items()}
            actions, self.executed, outputs = self.policy.act(acted, np.full(steps, greedy))
            chunk.actions.CopyFrom(batch(actions))
            for name, values in outputs.items():
                chunk.outputs[name].CopyFrom(tensor_to_proto(values))
        for name, value in fields.items():
            if isinstance(value, bytes | int | str):
                setattr(chunk, name, value)
            else:
                getattr(chunk, name).extend(value)
        return chunk

    def begin_upload(
        self, *chunks: pb.Chunk, timeout: float = CALL_TIMEOUT_S, **fields: Any
    ) -> grpc.Future:
        """UploadEpisodes, not waiting."""
        request = pb.UploadEpisodesRequest(session_id=self.session_id, chunks=chunks, **fields)
        return self.stub.UploadEpisodes.future(request, timeout=timeout, metadata=self.metadata)

    def upload(self, *chunks: pb.Chunk, **fields: Any) -> pb.UploadEpisodesResponse:
        """UploadEpisodes, waiting for the answer."""
        return self.begin_upload(*chunks, **fields).result()

    def deliver(self, *chunks: pb.Chunk, **fields: Any) -> pb.UploadEpisodesResponse:
        """The same, and nothing may have been refused."""
        answer = self.upload(*chunks, **fields)
        assert not answer.faults, answer.faults
        return answer
