"""Policy files on disk: whole or not at all, and never in the way."""

import hashlib
import multiprocessing
import os
import subprocess
import sys

import pytest

from client_sdk.policy_cache import FILES_KEPT, PolicyCache
from tests.server.talk import eventually


def sha256(model):
    return hashlib.sha256(model).digest()


def test_a_file_is_found_by_its_hash(tmp_path):
    cache = PolicyCache(tmp_path / "made" / "for it")
    cache.put(sha256(b"model"), b"model")
    assert cache.get(sha256(b"model")) == b"model"
    assert cache.get(sha256(b"another")) is None


def test_without_a_directory_nothing_is_kept():
    cache = PolicyCache(None)
    cache.put(sha256(b"model"), b"model")
    assert cache.get(sha256(b"model")) is None


@pytest.mark.parametrize("damage", [b"", b"mode", b"Model", b"model and more"])
def test_a_damaged_file_is_thrown_away(tmp_path, damage, caplog):
    cache = PolicyCache(tmp_path)
    cache.put(sha256(b"model"), b"model")
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert cache.get(sha256(b"model")) is None
    assert "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == []
    cache.put(sha256(b"model"), b"model")
    assert cache.get(sha256(b"model")) == b"model"


def test_the_files_used_longest_ago_go_first(tmp_path):
    cache = PolicyCache(tmp_path)
    models = [bytes([number]) for number in range(FILES_KEPT + 2)]
    for age, model in enumerate(models[:FILES_KEPT]):
        cache.put(sha256(model), model)
        os.utime(cache._path(tmp_path, sha256(model)), (age, age))
    assert cache.get(models and sha256(models[0])) is not None  # used: the newest now
    for model in models[FILES_KEPT:]:
        cache.put(sha256(model), model)
    kept = [model for model in models if cache.get(sha256(model)) is not None]
    assert kept == [models[0], *models[3:]]


def test_a_directory_that_is_none_costs_one_warning(tmp_path, caplog):
    file = tmp_path / "file"
    file.write_text("no directory")
    cache = PolicyCache(file)
    for _ in range(3):
        cache.put(sha256(b"model"), b"model")
        assert cache.get(sha256(b"model")) is None
    assert sum("policy cache" in record.message for record in caplog.records) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    script = (
        "import hashlib, pathlib, resource, signal, sys\n"
        "from client_sdk.policy_cache import PolicyCache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "cache = PolicyCache(pathlib.Path(sys.argv[1]))\n"
        "small, large = b'small', b'x' * 5000\n"
        "for model in (small, large):\n"
        "    cache.put(hashlib.sha256(model).digest(), model)\n"
        "print(cache.get(hashlib.sha256(small).digest()))\n"
        "print(cache.get(hashlib.sha256(large).digest()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["b'small'", "None"]
    assert "policy cache" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_while_writing_leaves_whole_files_and_nothing_for_long(tmp_path):
    script = (
        "import hashlib, itertools, pathlib, sys\n"
        "from client_sdk.policy_cache import PolicyCache\n"
        "cache = PolicyCache(pathlib.Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    model = bytes([number % 256]) * 20_000_000\n"
        "    cache.put(hashlib.sha256(model).digest(), model)\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        eventually(lambda: list(tmp_path.glob(".partial-*")))
        writer.kill()
    for file in tmp_path.glob("policy-*.onnx"):
        assert f"policy-{sha256(file.read_bytes()).hex()}.onnx" == file.name
    for left in tmp_path.glob(".partial-*"):
        os.utime(left, (0, 0))
    PolicyCache(tmp_path).put(sha256(b"model"), b"model")
    assert not list(tmp_path.glob(".partial-*"))


def _write_and_read(directory, seed):
    cache = PolicyCache(directory)
    for number in range(50):
        model = bytes([(number * seed) % 11]) * 10_000
        cache.put(sha256(model), model)
        found = cache.get(sha256(model))
        if found not in (None, model):
            os._exit(1)
    os._exit(0)


def test_processes_share_a_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_and_read, args=(tmp_path, seed)) for seed in (1, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
