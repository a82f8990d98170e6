"""The contract itself: its names, its prose, and stubs that are current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto/policyserver/v1/policyserver.proto"
STUBS = ("policyserver_pb2.py", "policyserver_pb2.pyi", "policyserver_pb2_grpc.py")


def protoc(*arguments):
    """Run the compiler as `make proto` does, from the root of the repository."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Iclient_sdk/wire={PROTO.parent}"]
    subprocess.run(
        [*command, *arguments, "client_sdk/wire/policyserver.proto"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    """The file descriptor, with the comments of the source."""
    out = tmp_path_factory.mktemp("descriptor") / "set.pb"
    protoc("--include_source_info", f"--descriptor_set_out={out}")
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    return file


def messages(file):
    """Every message by its dotted name; the entries that protoc makes for maps left out."""

    def walk(prefix, types):
        for message in types:
            if not message.options.map_entry:
                yield f"{prefix}{message.name}", message
                yield from walk(f"{prefix}{message.name}.", message.nested_type)

    return dict(walk("", file.message_type))


def enums(file):
    nested = [enum for message in messages(file).values() for enum in message.enum_type]
    return [*file.enum_type, *nested]


def methods(file):
    return [
        (service_index, index, service, method)
        for service_index, service in enumerate(file.service)
        for index, method in enumerate(service.method)
    ]


def test_generated_stubs_are_current(tmp_path):
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    for name in STUBS:
        fresh = (tmp_path / "client_sdk/wire" / name).read_text()
        committed = (ROOT / "client_sdk/wire" / name).read_text()
        assert committed == fresh, f"{name} is not what the contract says: run `make proto`"


def test_package_names_its_major_version_as_its_directory_does(contract):
    assert contract.package == "policyserver.v1"
    assert PROTO.relative_to(ROOT / "proto").parent.as_posix() == contract.package.replace(".", "/")


def test_every_rpc_has_a_request_and_a_response_of_its_own_name(contract):
    for _, _, _, method in methods(contract):
        assert method.input_type == f".{contract.package}.{method.name}Request"
        assert method.output_type == f".{contract.package}.{method.name}Response"


def test_every_service_and_every_rpc_says_what_it_does(contract):
    comments = {
        tuple(place.path): place.leading_comments.strip()
        for place in contract.source_code_info.location
    }
    for index, service in enumerate(contract.service):
        assert comments.get((6, index)), f"{service.name} has no comment"
    for service_index, index, service, method in methods(contract):
        name = f"{service.name}.{method.name}"
        assert comments.get((6, service_index, 2, index)), f"{name} has no comment"


def test_every_enum_starts_with_an_unspecified_zero(contract):
    for enum in enums(contract):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.value[0].number == 0
        assert enum.value[0].name == f"{prefix}_UNSPECIFIED"
        for value in enum.value:
            assert value.name.startswith(f"{prefix}_"), f"{value.name} lacks the prefix of its enum"


def test_names_are_camel_case_messages_and_snake_case_fields(contract):
    for name, message in messages(contract).items():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", message.name), name
        for field in message.field:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", field.name), f"{name}.{field.name}"
