"""What docs/onnx.md says of policy files is true of policy files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from kinds import MODULES, built_as

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.policy_spec import NoiseKind
from client_sdk.wire.batches import SpaceCodec
from tests.documents import ROOT, blocks, table

DOCUMENT = "docs/onnx.md"


@pytest.mark.parametrize("name", ["PPO flattened Dict", "C51 image", "SAC to uneven Box"])
def test_the_script_of_the_document_runs_a_file(name: str, tmp_path: Path) -> None:
    built, graph, _ = built_as(name)
    (tmp_path / "policy.onnx").write_bytes(graph.model)
    (script,) = blocks(DOCUMENT, "python")
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / "policy.onnx")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codec = SpaceCodec(built.observation_space)
    columns: dict[str, Any] = {
        path: np.zeros((3, *codec.leaf(path).shape), codec.leaf(path).dtype) for path in codec.paths
    }
    _, env_actions, _ = OnnxPolicy(graph.model).act(columns, np.ones(3, np.bool_))
    np.testing.assert_allclose(json.loads(done.stdout), env_actions[""], rtol=1e-6)


def test_the_script_of_the_document_is_ten_lines_without_imports() -> None:
    (script,) = blocks(DOCUMENT, "python")
    lines = [line for line in script.splitlines() if line and not line.startswith("import ")]
    assert len(lines) == 10


def test_the_metadata_is_what_the_document_lists() -> None:
    spec = OnnxPolicy(built_as("SAC")[1].model).spec
    assert {row[0] for row in table(DOCUMENT, "Metadata")} == set(spec.to_metadata())


@pytest.mark.parametrize("name", MODULES)
def test_what_a_file_gives_is_in_the_document(name: str) -> None:
    spec = OnnxPolicy(built_as(name)[1].model).spec
    assert f"`{spec.distribution}`" in (ROOT / DOCUMENT).read_text()
    assert set(spec.roles) <= {row[0] for row in table(DOCUMENT, "Outputs")}


def test_what_the_document_lists_is_in_some_file() -> None:
    specs = [OnnxPolicy(built_as(name)[1].model).spec for name in ("PPO to Box", "DQN")]
    found = {role for spec in specs for role in spec.roles}
    assert found == {row[0] for row in table(DOCUMENT, "Outputs")}
    assert {row[0] for row in table(DOCUMENT, "Noise")} == set(get_args(NoiseKind))
