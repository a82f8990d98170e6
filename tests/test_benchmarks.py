"""What the benchmarks write down beside their figures."""

import json

import pytest

from benchmarks import report


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "python -m benchmarks.stepping"),
        (
            ["--rounds", "5", "--seconds=0.1"],
            "python -m benchmarks.stepping --rounds 5 --seconds 0.1",
        ),
        (["--results", "out", "--rounds", "5"], "python -m benchmarks.stepping --rounds 5"),
        (["--results=out", "--peers", "python3"], "python -m benchmarks.stepping"),
        (["--other", "/opt/somewhere", "--quiet"], "python -m benchmarks.stepping --quiet"),
    ],
)
def test_results_name_their_command_with_its_options_and_no_place(
    monkeypatch, tmp_path, arguments, command
):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/stepping.py", *arguments])
    document = json.loads(report.write_json(tmp_path, "stepping", {"figures": 3}).read_text())
    assert document["command"] == command
    assert document["figures"] == 3
