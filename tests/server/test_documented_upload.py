"""What docs/protocol.md shows of acting alone takes place."""

from tests.documents import blocks
from tests.server.exporting import exporting


def test_conversation_of_acting_alone_takes_place():
    _, conversation = blocks("docs/protocol.md", "python")
    with exporting() as server:
        exec(compile(conversation, "docs/protocol.md", "exec"), {"address": server.address})
        assert server.unaccounted() == 0
        (chunk,) = server.collect(3)
        assert (chunk.steps, chunk.end.episode_return) == (3, 3.0)
