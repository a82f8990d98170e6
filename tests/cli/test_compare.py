"""`policy-server compare`: trainings that are real, though short."""

import json
import re

import pytest

from policy_server import cli
from policy_server.commands import comparison

WAYS = tuple(comparison.WAYS)


@pytest.mark.timeout(400)
def test_comparison_trains_in_each_way_and_tells_what_it_cost(tmp_path, capsys):
    arguments = ["compare", "--ways", *WAYS, "--seeds", "1", "--stop-iters", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    columns = re.split(r"\s{2,}", next(line for line in out.splitlines() if "CPU" in line).strip())
    rows = {}
    for way in WAYS:
        # The first line that starts with its name is the table's.
        line = next(line for line in out.splitlines() if line.startswith(comparison.WAYS[way]))
        rows[way] = dict(zip(columns, re.split(r"\s{2,}", line.strip()), strict=True))
        assert float(rows[way]["env steps/s"].replace(",", "")) > 0
        assert float(rows[way]["CPU us/step"]) > 0
        assert rows[way]["reached"] == "0/1"
    assert (
        float(rows["in_process"]["messages/step"]) == float(rows["in_process"]["bytes/step"]) == 0
    )
    for way in ("stepped", "remote"):
        # Eight environments share a request and an answer.
        assert 0.2 < float(rows[way]["messages/step"]) < 0.4
    assert 0 < float(rows["local"]["messages/step"]) < 0.1
    for way in WAYS[1:]:
        assert float(rows[way]["bytes/step"]) > 16  # an observation of four floats at least

    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["way"] for run in document["runs"]] == list(WAYS)
    for run in document["runs"]:
        assert run["env_steps"] == run["curve"][-1]["env_steps"] >= 4000
    alone, stepped = (
        [(point["env_steps"], point["mean_return"]) for point in run["curve"]]
        for run in document["runs"][:2]
    )
    assert alone == stepped  # the same environments, seeds and policy, bit for bit
    assert stepped[-1][1] > 0
    assert document["summary"] == list(rows.values())
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """A way whose training ends before its first episode does."""
    report = {"reached": False, "wall_s": 1.0, "env_steps_per_s": 9.0, "env_steps": 9}
    report |= {"messages": 0, "bytes": 0, "cpu_s": 0.1}
    report["curve"] = [{"wall_s": 1.0, "env_steps": 9, "mean_return": None}]
    program = f"import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text({json.dumps(report)!r})"
    (tmp_path / "remote.py").write_text(program)
    monkeypatch.setattr(comparison, "EXAMPLES", tmp_path)


def test_trainings_too_short_for_a_return_are_told_all_the_same(tmp_path, capsys, brief):
    out = tmp_path / "out"
    assert cli.main(["compare", "--ways", "remote", "--seeds", "1", "--out", str(out)]) == 0
    assert "0/1" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.png"}


def test_training_that_fails_ends_the_comparison_and_leaves_what_was_measured(
    tmp_path, capsys, brief
):
    (tmp_path / "local.py").write_text("raise SystemExit('no such luck')")
    out = tmp_path / "out"
    assert cli.main(["compare", "--ways", "remote", "local", "--out", str(out)]) == 1
    assert re.search(r"local, seed 1: failed \(1\)\nno such luck", capsys.readouterr().err)
    document = json.loads((out / "comparison.json").read_text())
    assert [run["way"] for run in document["runs"]] == ["remote"]
    assert len(document["summary"]) == 1


def test_without_the_examples_it_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "EXAMPLES", tmp_path)
    assert cli.main(["compare", "--ways", "remote", "--out", str(tmp_path / "out")]) == 1
    assert "install a checkout with `pip install -e`" in capsys.readouterr().err
