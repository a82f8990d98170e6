"""Local inference, put together: what clients that act alone are told, send, and wait for.

Loop thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.buffer import ExperienceBuffer
from policy_server.downloads import Downloads
from policy_server.episodes import EpisodeStore
from policy_server.sessions import Session
from policy_server.terms import Terms
from policy_server.tracks import EpisodeOptions
from policy_server.upload_gate import UploadGate
from policy_server.uploads import UploadRecorder
from policy_server.waiting import Waiting

_FIRST_POLICY_WAIT_S = 10.0
"""An upload that comes before the first policy waits so long for it."""


class LocalInference:
    """What a server offers to clients that act alone.

    Attributes:
        downloads: Answers ``GetPolicy``.
        recorder: Takes chunks.
        gate: Holds uploads back.
    """

    def __init__(
        self,
        terms: Terms,
        downloads: Downloads,
        recorder: UploadRecorder,
        gate: UploadGate,
        store: EpisodeStore,
        buffer: ExperienceBuffer,
    ) -> None:
        """Prepare.

        Args:
            terms: On which clients act.
            downloads: Answers ``GetPolicy``.
            recorder: Takes chunks.
            gate: Holds uploads back.
            store: Their episodes.
            buffer: Where they go.
        """
        self.downloads = downloads
        self.recorder = recorder
        self.gate = gate
        self._store = store
        self._buffer = buffer
        self._impossible = terms.remote_only
        self._steps_per_upload = terms.steps_per_upload
        self._hold = terms.hold

    def check_possible(self, field: str = "") -> None:
        """Refuse clients that act alone, where no file of the policy can be had.

        Raises:
            Fault: NO_LOCAL_INFERENCE, with the reason.
        """
        if self._impossible is not None:
            raise Fault(
                Reason.NO_LOCAL_INFERENCE,
                "this server serves remote inference only, for its policy has no ONNX file "
                f'({self._impossible}); ask it for every action: inference_mode="remote", or '
                "--inference remote (INFERENCE_MODE_REMOTE on the wire)",
                field,
            )

    def greet(self, response: pb.OpenSessionResponse, sessions: int) -> None:
        """Tell a client what it needs to know to act alone; it is one of so many."""
        response.holds = self._hold
        response.steps_per_upload = self._steps_per_upload
        if self._hold:
            # One upload of each client fits in: what has to wait for room becomes too old.
            share = self._buffer.capacity_steps // max(1, sessions)
            response.steps_per_upload = max(1, min(self._steps_per_upload, share))

    def cancel(self, fault: Fault) -> None:
        """End all calls that wait."""
        self.downloads.files.cancel(fault)
        self.gate.cancel(fault)

    async def _files_are_known(self, chunks: Sequence[pb.Chunk], call: Waiting) -> None:
        """Wait for the first weights, and the checkpoint's, of a server that was restarted.

        Its clients are back sooner, with experience of policies that it is about to publish again.
        """
        files = self.downloads.files
        await files.other_than(b"", _FIRST_POLICY_WAIT_S, call)
        unknown = [each for each in chunks if files.find(each.policy_sha256) is None]
        await files.restored(max((each.policy_version for each in unknown), default=0), call)

    async def upload(
        self,
        session: Session,
        request: pb.UploadEpisodesRequest,
        starts: Mapping[int, EpisodeOptions],
        call: Waiting,
    ) -> pb.UploadEpisodesResponse:
        """Take a request's chunks, and answer when the client may go on.

        Args:
            session: Whose it is.
            request: Its starts and metrics were checked.
            starts: Options of the episodes that start.
            call: It, while it waits.

        Raises:
            Fault: Nothing was taken; but where the answer was held, all was (NOT_READY).
        """
        if not session.local:
            raise Fault(
                Reason.WRONG_MODE,
                "expected rows (Act, StreamAct) in a session of INFERENCE_MODE_REMOTE, got an "
                "upload; open one of INFERENCE_MODE_LOCAL to act alone",
                "session_id",
            )
        book, log, chunks = session.book, session.uploads, request.chunks
        self.recorder.check(request)
        if chunks:
            await self._files_are_known(chunks, call)
        if self.recorder.fills(chunks, starts, book, log):
            await self.gate.room(call)
        if news := self.recorder.news(chunks, log):
            session.steps.take(news)
        faults = self.recorder.take(chunks, starts, request.metrics, book, log)
        self._store.settle()
        self.gate.let_in()
        unanswered = log.unanswered
        if unanswered and any(chunk.sequence == unanswered for chunk in chunks):
            await self.gate.answer(call)
            if log.unanswered == unanswered:
                log.unanswered = 0
        newest = self.downloads.files.newest
        response = pb.UploadEpisodesResponse(
            accepted_sequence=log.accepted,
            delivered_sequence=log.deliveries.through,
            policy_version=0 if newest is None else newest.version,
        )
        for index, fault in faults:
            response.faults.add(index=index, error=fault.to_detail())
        return response
