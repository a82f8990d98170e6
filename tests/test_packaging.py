"""What an installation promises: typed packages, a licence, pins, and commands that exist."""

import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUDA = re.compile("nvidia|cuda|triton")
"""PyPI's torch for Linux brings it along, and pins it itself; the CPU build has none of it."""
HEAVY = ("ray", "torch", "onnx", "onnxruntime", "matplotlib", "rich")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("package", ["client_sdk", "policy_server"])
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_lock_holds_nothing_but_exact_versions():
    for line in pins():
        # No index, no host, no path, no local version suffix: the file is for every machine.
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_lock_pins_every_direct_dependency():
    pinned = {canonical(line.partition("==")[0]) for line in pins()}
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    for requirement in [*PROJECT["dependencies"], *extras]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        assert canonical(name) in pinned, f"{name} is not in requirements.lock: run `make lock`"


def test_lock_pins_what_the_dependencies_depend_on():
    """Recursively, as they are installed here; the pins are within what each of them asks for."""
    pinned = dict(line.split("==") for line in pins())
    versions = {canonical(name): version for name, version in pinned.items()}
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    todo = [Requirement(text) for text in [*PROJECT["dependencies"], *extras]]
    done = set()
    while todo:
        requirement = todo.pop()
        name = canonical(requirement.name)
        if name == "policy-server" or CUDA.match(name) or str(requirement) in done:
            continue
        done.add(str(requirement))
        assert name in versions, f"{requirement} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(versions[name], prereleases=True), requirement
        try:
            texts = metadata.requires(requirement.name) or ()
        except metadata.PackageNotFoundError:  # one of the tools for developers, not needed here
            continue
        for text in texts:
            needed = Requirement(text)
            wanted = ({"extra": extra} for extra in ("", *requirement.extras))
            if needed.marker is None or any(map(needed.marker.evaluate, wanted)):
                todo.append(needed)
    assert len(done) > len(extras)


def test_client_needs_neither_ray_nor_torch_nor_onnxruntime():
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    for system, besides in (("linux", set()), ("darwin", {"psutil"}), ("win32", {"psutil"})):
        there = {"sys_platform": system}
        names = {
            each.name for each in requirements if not each.marker or each.marker.evaluate(there)
        }
        assert names == {"grpcio", "gymnasium", "numpy", "protobuf"} | besides


def test_importing_the_client_loads_nothing_heavy():
    code = f"""
import sys
import client_sdk, client_sdk.runner, client_sdk.cli
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["policy-server", "policy-client"])
def test_both_commands_are_there(command):
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
