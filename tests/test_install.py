"""Installations into empty environments, as a stranger makes them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def install(directory, requirement):
    """An environment of its own with that requirement in it; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=120)
    python = directory / "bin/python"
    lock = ROOT / "requirements.lock"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", lock]
    subprocess.run([*pip, requirement], cwd=ROOT, check=True, timeout=1000)
    return python


def run(python, code, cwd):
    """Run code away from the sources, so that only what is installed can be imported."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_plain_install_gives_the_client_alone(tmp_path):
    python = install(tmp_path / "env", ".")
    run(python, "import client_sdk, client_sdk.runner, client_sdk.aio", tmp_path)
    found = run(
        python,
        "import importlib.util as u; "
        "print([n for n in ('ray', 'torch', 'onnx', 'onnxruntime') if u.find_spec(n)])",
        tmp_path,
    )
    assert found == "[]"
    helped = subprocess.run(
        [python.parent / "policy-client", "--help"], check=True, capture_output=True, timeout=60
    )
    assert b"run" in helped.stdout
    # The server's command says in one line what is missing.
    missing = subprocess.run(
        [python.parent / "policy-server", "train", "--env", "CartPole-v1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert missing.returncode == 3
    assert len(missing.stderr.strip().splitlines()) == 1
    assert "policy-server[server]" in missing.stderr


def test_install_with_the_server_gives_both(tmp_path):
    python = install(tmp_path / "env", ".[server]")
    run(python, "import client_sdk, policy_server; policy_server.PolicyServerEnvRunner", tmp_path)
    helped = subprocess.run(
        [python.parent / "policy-server", "--help"], check=True, capture_output=True, timeout=60
    )
    assert b"train" in helped.stdout
