"""What the documents say is run, or compared with the code that they speak of."""

import ast
import dataclasses
import json
import re
import subprocess
import sys

import gymnasium
import pytest

from client_sdk import errors
from client_sdk.wire.faults import STATUS_OF_REASON, Reason
from policy_server import PolicyServerConfig
from policy_server.commands.space_files import read_spaces
from tests.documents import ROOT, blocks, table
from tests.servers import serving

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def exception_classes():
    return {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.PolicyClientError)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", document.read_text()):
        assert not target or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_is_python(document):
    for block in blocks(document, "python"):
        ast.parse(block)


def test_benchmarks_that_documents_name_exist():
    text = "".join(document.read_text() for document in DOCUMENTS)
    named = set(re.findall(r"python -m (benchmarks\.\w+)", text))
    assert {"benchmarks.inference", "benchmarks.acting", "benchmarks.wire_columns"} <= named
    for name in named:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_conversation_of_the_protocol_takes_place():
    conversation, _ = blocks("docs/protocol.md", "python")
    with serving() as server:
        exec(compile(conversation, "docs/protocol.md", "exec"), {"address": server.address})
        chunks = server.collect(4)
        assert sum(chunk.steps for chunk in chunks) == 4
        assert server.ledger()["received"] == 4


def test_limits_are_all_listed_with_their_defaults():
    listed = {row[0]: float(row[1]) for row in table("docs/security.md", "Limits")}
    fields = dataclasses.fields(PolicyServerConfig)
    limits = {field.name: field.default for field in fields if field.name.startswith("max_")}
    del limits["max_policy_lag"]  # of what RLlib learns from, not of clients
    assert listed == limits


def test_rllib_accepts_the_configuration_that_steps_hosted_environments():
    pytest.importorskip("ray")
    (code,) = (
        block for block in blocks("docs/stepping.md", "python") if "RemoteEnvCreator" in block
    )
    names = {}
    exec(compile(code, "docs/stepping.md", "exec"), names)
    names["config"].validate()


def test_every_reason_is_documented_with_its_status_and_its_class():
    documented = {
        row[0]: (row[1], row[2]) for row in table("docs/errors.md", "Reasons that travel")
    }
    expected = {
        reason.name: (
            STATUS_OF_REASON[reason].name,
            errors.ERROR_OF_REASON.get(reason, errors.ServerError).__name__,
        )
        for reason in Reason
    }
    assert documented == expected
    for row in table("docs/errors.md", "Reasons that travel"):
        assert all(row), f"{row[0]}: cause or cure is missing"


def test_every_exception_class_is_documented():
    text = (ROOT / "docs/errors.md").read_text()
    missing = [kind.__name__ for kind in exception_classes() if f"`{kind.__name__}`" not in text]
    assert not missing


def test_spaces_of_the_example_can_be_read(tmp_path):
    (example,) = blocks("docs/cli.md", "json")
    json.loads(example)
    path = tmp_path / "robot.json"
    path.write_text(example)
    observation_space, action_space = read_spaces(path)
    assert observation_space["camera"].shape == (84, 84, 3)
    assert observation_space["gear"].n == 6
    assert isinstance(action_space, gymnasium.spaces.Box)


def test_documents_list_the_exit_codes_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "policy_server.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    listed = re.findall(r"^  (\d+) +\S", done.stdout, re.MULTILINE)
    assert [row[0] for row in table("docs/cli.md", "Exit codes of policy-server")] == listed
