"""Chunks wait in order, within bounds, and survive the server that knew them."""

import pytest

from client_sdk.chunks import CutChunk, Lineage
from client_sdk.rows import EpisodeOptions, Status
from client_sdk.spool import Spool

MANY = 2**40


class Experience:
    """Episodes that write themselves into a spool, 10 steps and 1000 bytes a chunk."""

    def __init__(self, limit_bytes=MANY, directory=None):
        self.lost = []
        self.spool = Spool(limit_bytes, directory, self.lost.extend)
        self.written = 0

    def episode(self):
        return Lineage(EpisodeOptions())

    def write(self, lineage, first_step, steps=10):
        data = bytes([self.written % 256]) * 1000
        self.written += 1
        status = Status.RUNNING if steps else Status.ABANDONED
        self.spool.add([CutChunk(lineage, steps, first_step, status, data)])

    def take(self, limit_bytes=MANY, limit_steps=MANY):
        return self.spool.take(limit_bytes, limit_steps)


def numbers(entries):
    return [(entry.sequence, entry.episode, entry.chunk.first_step) for entry in entries]


@pytest.fixture(params=["memory", "disk"])
def directory(request, tmp_path, monkeypatch):
    if request.param == "memory":
        return None
    monkeypatch.setattr("client_sdk.spool.MEMORY_BYTES", 1500)
    return tmp_path / "made" / "for it"


def test_chunks_are_numbered_in_order_and_come_again_until_answered(directory):
    experience = Experience(directory=directory)
    first, second = experience.episode(), experience.episode()
    experience.write(first, 0)
    experience.write(second, 0)
    experience.write(first, 10)
    taken = experience.take()
    assert numbers(taken) == [(1, 1, 0), (2, 2, 0), (3, 1, 10)]
    assert [entry.starts for entry in taken] == [True, True, False]
    assert [entry.data()[0] for entry in taken] == [0, 1, 2]
    experience.write(second, 10)
    assert experience.take() == taken
    assert experience.spool.answered(2, 0) == 20
    assert numbers(experience.take()) == [(3, 1, 10)]
    experience.spool.answered(3, 0)
    assert numbers(experience.take()) == [(4, 2, 10)]
    experience.spool.close()


def test_what_the_server_has_delivered_is_forgotten(directory):
    experience = Experience(directory=directory)
    lineage = experience.episode()
    for step in range(0, 50, 10):
        experience.write(lineage, step)
    experience.take()
    experience.spool.answered(5, 3)
    assert experience.spool.size_bytes == 2000
    experience.spool.answered(5, 5)
    assert experience.spool.size_bytes == 0
    assert experience.lost == []
    experience.spool.close()


def test_a_request_is_bounded_by_bytes_and_steps():
    experience = Experience()
    lineage = experience.episode()
    for step in range(0, 50, 10):
        experience.write(lineage, step)
    assert len(experience.take(limit_bytes=2500)) == 2
    experience.spool.answered(2, 2)
    assert len(experience.take(limit_steps=15)) == 1
    experience.spool.answered(3, 3)
    assert len(experience.take(limit_bytes=10)) == 1  # larger than the limit: alone


def test_the_oldest_goes_first_and_its_episode_goes_on_as_another(directory):
    experience = Experience(limit_bytes=3000, directory=directory)
    lineage = experience.episode()
    experience.write(lineage, 0)
    experience.take()
    experience.spool.answered(1, 1)
    for step in range(10, 60, 10):
        experience.write(lineage, step)
    assert [chunk.first_step for chunk in experience.lost] == [10, 20]
    taken = experience.take()
    assert numbers(taken) == [(2, 2, 30), (3, 2, 40), (4, 2, 50)]
    assert lineage.resumed
    experience.spool.close()


def test_steps_that_the_server_does_not_have_are_counted(directory):
    experience = Experience(limit_bytes=8000, directory=directory)
    spool, bad, good = experience.spool, experience.episode(), experience.episode()
    for step in (0, 10):
        experience.write(bad, step)
        experience.write(good, step)
    assert spool.untaken_steps() == 40
    experience.take(limit_steps=30)
    assert spool.untaken_steps() == 40  # on their way is not there
    spool.answered(2, 1)
    assert spool.untaken_steps() == 20
    spool.another_session(1)  # which has the delivered one alone
    assert spool.untaken_steps() == 30
    (first, *_) = experience.take()
    assert first.chunk.lineage is good
    spool.refused({2})  # of the bad one
    assert spool.untaken_steps() == 20
    spool.answered(3, 3)
    assert spool.untaken_steps() == 0
    experience.write(good, 20)
    experience.take()
    spool.rejected()
    assert spool.untaken_steps() == 0
    for step in range(0, 90, 10):  # one too many
        experience.write(good, step, steps=7)
    assert spool.untaken_steps() == 8 * 7
    spool.close()
    assert spool.untaken_steps() == 0


def test_what_the_server_has_goes_before_what_it_has_not():
    experience = Experience(limit_bytes=4000)
    lineage = experience.episode()
    experience.write(lineage, 0)
    experience.take()
    experience.spool.answered(1, 0)  # kept, for it is not delivered
    for step in (10, 20, 30, 40):
        experience.write(lineage, step)
    assert experience.lost == []
    assert experience.spool.size_bytes == 4000
    taken = experience.take()
    assert numbers(taken) == [(2, 1, 10), (3, 1, 20), (4, 1, 30), (5, 1, 40)]


def test_what_the_server_has_takes_a_quarter_of_the_room_at_most():
    experience = Experience(limit_bytes=8000)
    lineage = experience.episode()
    for step in range(0, 60, 10):
        experience.write(lineage, step)
    experience.take()
    experience.spool.answered(6, 0)
    assert experience.spool.size_bytes == 2000
    experience.spool.another_session(0)
    assert [entry.chunk.first_step for entry in experience.take()] == [40, 50]
    assert experience.lost == []


def test_what_is_on_its_way_is_not_dropped():
    experience = Experience(limit_bytes=2000)
    lineage = experience.episode()
    experience.write(lineage, 0)
    taken = experience.take()
    for step in (10, 20, 30):
        experience.write(lineage, step)
    assert experience.take() == taken
    assert [chunk.first_step for chunk in experience.lost] == [10, 20]


def test_another_session_is_offered_again_what_was_not_delivered(directory):
    experience = Experience(directory=directory)
    done, running, fresh = (experience.episode() for _ in range(3))
    experience.write(done, 0)
    experience.write(running, 0)
    experience.write(running, 10)
    experience.take(limit_steps=30)
    experience.spool.answered(2, 1)  # the third is on its way
    experience.write(fresh, 0)
    experience.spool.another_session(1)
    taken = experience.take()
    assert [(entry.sequence, entry.chunk.lineage) for entry in taken] == [
        (1, running),
        (2, running),
        (3, fresh),
    ]
    assert [entry.starts for entry in taken] == [True, False, True]
    assert running.resumed  # it may have been learnt from
    assert not fresh.resumed  # nobody has ever seen it
    # Numbers are never used again, and an episode that had nothing waiting is another one too.
    experience.write(done, 10)
    experience.spool.answered(3, 3)
    (entry,) = experience.take()
    assert entry.starts
    assert entry.episode not in {each.episode for each in taken}
    assert done.resumed
    experience.spool.close()


def test_a_refused_chunk_takes_what_follows_in_its_episode_along():
    experience = Experience()
    bad, good = experience.episode(), experience.episode()
    experience.write(bad, 0)
    experience.write(good, 0)
    experience.take()
    experience.write(bad, 10)
    experience.write(good, 10)
    assert experience.spool.refused({1}) == 2
    experience.spool.answered(2, 0)
    assert [chunk.lineage for chunk in experience.lost] == [bad, bad]
    assert numbers(experience.take()) == [(3, 2, 10)]
    experience.write(bad, 20)
    experience.spool.answered(3, 3)
    (entry,) = experience.take()
    assert (entry.starts, entry.episode, bad.resumed) == (True, 3, True)


def test_numbers_of_a_rejected_request_are_free_again():
    experience = Experience()
    lineage = experience.episode()
    experience.write(lineage, 0)
    experience.take()
    assert experience.spool.rejected() == 1
    experience.write(lineage, 10)
    assert numbers(experience.take()) == [(1, 2, 10)]


def test_taking_back_what_the_session_does_not_know_is_not_sent():
    experience = Experience()
    lineage = experience.episode()
    experience.write(lineage, 0)
    experience.take()
    experience.spool.another_session(1)  # it had arrived, and been delivered
    experience.write(lineage, 10, steps=0)
    assert experience.take() == []
    assert experience.lost == []


def test_where_the_disk_fails_memory_takes_over_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("client_sdk.spool.MEMORY_BYTES", 2500)
    file = tmp_path / "file"
    file.write_text("no directory")
    experience = Experience(directory=file)
    assert "cannot keep experience" in caplog.text  # known before it is needed
    lineage = experience.episode()
    for step in range(0, 60, 10):
        experience.write(lineage, step)
    assert [entry.chunk.first_step for entry in experience.take()] == [40, 50]
    assert len(experience.lost) == 4
    assert sum("cannot keep experience" in record.message for record in caplog.records) == 1


def test_nothing_is_left_in_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("client_sdk.spool.MEMORY_BYTES", 0)
    monkeypatch.setattr("client_sdk.spool_disk._SEGMENT_BYTES", 3000)
    experience = Experience(directory=tmp_path)
    lineage = experience.episode()
    for step in range(0, 100, 10):
        experience.write(lineage, step)
    assert [entry.data()[0] for entry in experience.take()] == list(range(10))
    assert list(tmp_path.iterdir()) == []
    experience.spool.answered(10, 10)
    experience.spool.close()
