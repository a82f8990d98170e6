"""local.js: the downloaded policy acts, and what came of it is uploaded."""

import contextlib
import hashlib
import re
from collections import Counter
from concurrent import futures
from pathlib import Path

import grpc

from client_sdk.wire import policyserver_pb2 as pb
from tests.javascript.support import EXAMPLE, node, output_of, running
from tests.javascript.test_remote import EPISODE, ends_of, port_of
from tests.server.exporting import exporting
from tests.server.talk import eventually

DOWNLOADING = Path(__file__).parent / "downloading.mjs"
TAKEN = re.compile(r"^policy version (\d+), ", re.MULTILINE)


def play(server, *arguments):
    return running("local.js", "--server", server.address, *arguments)


def test_episodes_arrive():
    with exporting(steps_per_upload=50) as server:
        output = node("local.js", "--server", server.address, "--episodes", 9)
        assert server.unaccounted() == 0
        printed = [int(total) for _, total, _ in EPISODE.findall(output)]
        assert len(printed) == 9
        assert [end.episode_return for end in ends_of(server)] == printed
        assert server.ledger()["received"] == sum(printed)


def test_on_policy_the_next_version_is_awaited():
    with exporting(steps_per_upload=50, hold=True) as server, play(server) as process:
        for version in range(1, 5):
            eventually(lambda: server.ledger()["received"] >= 50 * version, within_s=20)  # noqa: B023
            server.publish(version + 1)
        process.kill()
        output, _ = process.communicate()
        assert TAKEN.findall(output)[:4] == ["1", "2", "3", "4"]
        steps = Counter()
        for chunk in server.collect(10_000, timeout_s=0.1):
            steps[chunk.policy.version] += chunk.steps
        assert [steps[version] for version in range(1, 5)] == [50] * 4


def test_experience_that_comes_too_late_costs_its_episode_only():
    with (
        exporting(steps_per_upload=50, policies_kept=1, policies_remembered=1) as server,
        play(server, "--episodes", 30) as process,
    ):
        version = 1
        while process.poll() is None:
            version += 1
            server.publish(version)
        output = output_of(process)
        assert "refused" in output
        assert server.unaccounted() == 0


def test_it_goes_on_where_the_server_was_restarted():
    with contextlib.ExitStack() as stack:
        with exporting(steps_per_upload=20) as first:
            process = stack.enter_context(play(first, "--episodes", 60))
            eventually(lambda: first.ledger()["received"] > 0)
        with exporting(port=port_of(first), steps_per_upload=20) as second:
            output = output_of(process)
            assert "our session is over" in output
            assert len(EPISODE.findall(output)) == 60
            assert second.unaccounted() == 0
            assert len(ends_of(second)) > 0


def test_damaged_downloads_are_repeated():
    file = b"a policy"
    arriving = iter([b"a pilocy", file])

    def download(request, context):
        digest = hashlib.sha256(file).digest()
        yield pb.GetPolicyResponse(header={"sha256": digest, "size_bytes": len(file)})
        yield pb.GetPolicyResponse(piece=next(arriving))

    answers = {
        "OpenSession": grpc.unary_unary_rpc_method_handler(
            lambda request, context: pb.OpenSessionResponse(session_id="1"),
            response_serializer=pb.OpenSessionResponse.SerializeToString,
        ),
        "CloseSession": grpc.unary_unary_rpc_method_handler(lambda request, context: b""),
        "GetPolicy": grpc.unary_stream_rpc_method_handler(
            download, response_serializer=pb.GetPolicyResponse.SerializeToString
        ),
    }
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("policyserver.v1.PolicyService", answers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        output = node(DOWNLOADING, EXAMPLE / "policy_client.js", f"127.0.0.1:{port}")
    finally:
        server.stop(0).wait(20)
    assert output.strip() == "a policy"
    assert next(arriving, None) is None
