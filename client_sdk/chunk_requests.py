"""Chunks as the messages of a session; what ``row_requests`` is to rows. No I/O but the spool's disk."""

from __future__ import annotations

from collections.abc import Iterable

from client_sdk.row_requests import add_start
from client_sdk.spool import Entry
from client_sdk.wire import policyserver_pb2 as pb


def chunk_request(entries: Iterable[Entry]) -> pb.UploadEpisodesRequest:
    """The upload of those chunks, which the spool has numbered; without its session.

    Raises:
        OSError: The disk does not give one back.
    """
    request = pb.UploadEpisodesRequest()
    for entry in entries:
        lineage = entry.chunk.lineage
        if entry.starts and (lineage.resumed or not lineage.options.are_default):
            add_start(request.starts, entry.episode, lineage.options, resumed=lineage.resumed)
        chunk = request.chunks.add()
        chunk.ParseFromString(entry.data())
        chunk.sequence, chunk.episode = entry.sequence, entry.episode
        if entry.chunk.metrics:
            request.metrics.add(episode=entry.episode, values=entry.chunk.metrics)
    return request
