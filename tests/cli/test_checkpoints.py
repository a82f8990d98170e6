"""The directory of checkpoints: whole or not there."""

import errno

import pytest

from policy_server.commands.checkpoints import LATEST, CheckpointDirectory


def save_as(text):
    def save(directory):
        (directory / "weights").write_text(text)

    return save


def disk_full(directory):
    (directory / "weights").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(directory):
    (directory / "weights").write_text("half")
    raise KeyboardInterrupt


def test_latest_is_the_newest_complete_checkpoint(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    assert directory.latest() is None
    directory.write(5, save_as("five"))
    directory.write(10, save_as("ten"))
    assert (tmp_path / LATEST / "weights").read_text() == "ten"
    assert directory.latest() == (tmp_path / "iteration_000010").resolve()


@pytest.mark.parametrize(("save", "error"), [(disk_full, OSError), (interrupted, BaseException)])
def test_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, save, error):
    directory = CheckpointDirectory(tmp_path)
    directory.write(5, save_as("five"))
    with pytest.raises(error):
        directory.write(10, save)
    assert (tmp_path / LATEST / "weights").read_text() == "five"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iteration_000005", LATEST]


def test_checkpoint_of_the_same_iteration_is_replaced(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.write(5, save_as("old"))
    directory.write(5, save_as("new"))
    assert (tmp_path / LATEST / "weights").read_text() == "new"


def test_only_the_newest_few_are_kept(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    for iteration in (5, 10, 15, 20):
        directory.write(iteration, save_as(str(iteration)))
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["iteration_000015", "iteration_000020", LATEST]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    CheckpointDirectory(tmp_path).write(5, save_as("five"))
    (tmp_path / ".writing-iteration_000010-4711").mkdir()
    assert CheckpointDirectory(tmp_path).latest() == (tmp_path / "iteration_000005").resolve()
    assert not list(tmp_path.glob(".writing-*"))


def test_fresh_directory_with_checkpoints_is_refused_and_left_as_it_is(tmp_path):
    CheckpointDirectory(tmp_path, fresh=True).write(5, save_as("five"))
    (tmp_path / ".writing-iteration_000010-4711").mkdir()  # perhaps of somebody at work
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match=r"another training \(iteration_000005\)"):
        CheckpointDirectory(tmp_path, fresh=True)
    assert sorted(tmp_path.iterdir()) == before


def test_directory_may_be_moved(tmp_path):
    CheckpointDirectory(tmp_path / "here").write(5, save_as("five"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there" / LATEST / "weights").read_text() == "five"
