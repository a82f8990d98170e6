"""Local inference where something goes wrong: downloads, uploads, servers and networks."""

import hashlib
import queue
import threading
from concurrent import futures

import grpc
import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.connectors.env_to_module import FlattenObservations

from client_sdk import Timeouts
from client_sdk.errors import LimitExceededError, SpaceMismatchError
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason
from client_sdk.wire.spaces import space_to_proto
from tests.client.acting_alone import serving_alone
from tests.client.support import LOCAL_KINDS, PATIENCE_S, Relay, connected, seen
from tests.server.talk import eventually
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS

CODEC = SpaceCodec(CARTPOLE_OBSERVATIONS)


@pytest.fixture(params=LOCAL_KINDS)
def kind(request):
    """Which client."""
    return request.param


@pytest.fixture(scope="module")
def models():
    """Two policy files by version, which choose 0 and 1."""
    with serving_alone(first_version=None) as server:
        return {version: server.publish(version, version - 1).model for version in (1, 2)}


class ScriptedHost:
    """A server that says what a test wants said to a client that acts alone.

    Attributes:
        model: The newest file and its version.
        downloads: Requests for it.
        uploads: Requests, in the order of arrival.
        on_download: Makes the parts that are streamed for another file.
        on_upload: Makes the answer to an upload.
        session: Id of the session that the next hello gets.
    """

    def __init__(self, model, *, holds=False):
        self.model = (1, model)
        self.holds = holds
        self.session = "first"
        self.delivered = 0
        self.downloads = []
        self.uploads = queue.Queue()
        self.on_download = self.parts
        self.on_upload = self.taken
        self._changed = threading.Condition()
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        handlers = {
            "OpenSession": grpc.unary_unary_rpc_method_handler(
                self._open,
                pb.OpenSessionRequest.FromString,
                pb.OpenSessionResponse.SerializeToString,
            ),
            "CloseSession": grpc.unary_unary_rpc_method_handler(
                lambda *_: pb.CloseSessionResponse(),
                pb.CloseSessionRequest.FromString,
                pb.CloseSessionResponse.SerializeToString,
            ),
            "GetPolicy": grpc.unary_stream_rpc_method_handler(
                self._download,
                pb.GetPolicyRequest.FromString,
                pb.GetPolicyResponse.SerializeToString,
            ),
            "UploadEpisodes": grpc.unary_unary_rpc_method_handler(
                self._upload,
                pb.UploadEpisodesRequest.FromString,
                pb.UploadEpisodesResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("policyserver.v1.PolicyService", handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.publish(-1, b"")
        self._server.stop(0).wait(PATIENCE_S)

    def publish(self, version, model):
        with self._changed:
            self.model = (version, model)
            self._changed.notify_all()

    def next_upload(self):
        return self.uploads.get(timeout=PATIENCE_S)

    def parts(self, version, model):
        sha256 = hashlib.sha256(model).digest()
        yield header(version, len(model), sha256)
        for at in range(0, len(model), 1000):
            yield pb.GetPolicyResponse(piece=model[at : at + 1000])

    def taken(self, request):
        last = request.chunks[-1].sequence if request.chunks else 0
        return pb.UploadEpisodesResponse(accepted_sequence=last, delivered_sequence=last)

    def _open(self, hello, _):
        response = pb.OpenSessionResponse(
            session_id=self.session,
            protocol_version="1.0",
            steps_per_upload=10,
            holds=self.holds,
            delivered_sequence=self.delivered,
        )
        response.agents[""].observation_space.CopyFrom(space_to_proto(CARTPOLE_OBSERVATIONS))
        response.agents[""].action_space.CopyFrom(space_to_proto(CARTPOLE_ACTIONS))
        response.lease.FromSeconds(30)
        return response

    def _download(self, request, context):
        def is_new():
            version, model = self.model
            return version < 0 or hashlib.sha256(model).digest() != request.have_sha256

        self.downloads.append(request)
        with self._changed:
            self._changed.wait_for(is_new, min(request.wait.ToMicroseconds() / 1e6, 1.0))
            version, model = self.model
        if version < 0:
            return
        if not is_new():
            yield header(version, 0, request.have_sha256)
            return
        try:
            yield from self.on_download(version, model)
        except Fault as fault:
            refuse(context, fault)

    def _upload(self, request, context):
        self.uploads.put(request)
        try:
            return self.on_upload(request)
        except Fault as fault:
            refuse(context, fault)


def refuse(context, fault):
    context.set_trailing_metadata(((ERROR_TRAILER, fault.to_detail().SerializeToString()),))
    context.abort(fault.status, str(fault))


def header(version, size, sha256):
    return pb.GetPolicyResponse(
        header=pb.PolicyHeader(policy_version=version, size_bytes=size, sha256=sha256)
    )


def play(client, steps, first=0, **options):
    with client.episode(**options) as episode:
        for step in range(steps):
            episode.act(seen(first + step))
        episode.end(seen(first + steps), terminated=True)


def told(request):
    """(sequence, episode, first step, first observation) of each chunk."""
    return [
        (
            chunk.sequence,
            chunk.episode,
            chunk.first_step,
            float(np.frombuffer(chunk.observations.leaves[""].data, np.float32)[0]),
        )
        for chunk in request.chunks
    ]


def resumed(request):
    return {start.episode for start in request.starts if start.resumed}


def rows_of(chunks):
    return [float(batch.observations[""][row, 0]) for chunk in chunks for batch, row in chunk.rows]


# -- downloads -------------------------------------------------------------------------------------


DAMAGES = {
    "truncated": lambda parts: parts[:-1],
    "another piece": lambda parts: [*parts[:-1], pb.GetPolicyResponse(piece=b"\0" * 1000)],
    "too much": lambda parts: [*parts, pb.GetPolicyResponse(piece=b"more")],
    "no header": lambda parts: parts[1:],
    "nothing": lambda parts: [],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_download_leaves_the_old_policy_and_is_repeated(kind, models, damage):
    damaged, mend = threading.Event(), threading.Event()
    with (
        ScriptedHost(models[1]) as host,
        connected(kind, host.address) as client,
        client.episode() as episode,
    ):
        assert episode.act(seen(0)) == 0

        def at_first_damaged(version, model):
            parts = list(host.parts(version, model))
            if not mend.is_set():
                damaged.set()
                parts = DAMAGES[damage](parts)
            return iter(parts)

        host.on_download = at_first_damaged
        host.publish(2, models[2])
        assert damaged.wait(PATIENCE_S)
        assert episode.act(seen(1)) == 0
        mend.set()
        steps = iter(range(2, 10**9))
        eventually(lambda: episode.act(seen(next(steps))) == 1)


def test_a_whole_file_that_is_no_policy_is_not_taken(kind, models, caplog):
    with (
        ScriptedHost(models[1]) as host,
        connected(kind, host.address) as client,
        client.episode() as episode,
    ):
        assert episode.act(seen(0)) == 0
        host.publish(2, b"whole, but no policy")
        eventually(lambda: "did not arrive whole" in caplog.text)
        assert episode.act(seen(1)) == 0
        host.publish(2, models[2])
        steps = iter(range(2, 10**9))
        eventually(lambda: episode.act(seen(next(steps))) == 1)


def test_a_connection_lost_in_the_middle_of_a_download_is_repeated(kind, models):
    with ScriptedHost(models[1]) as host, Relay(host.address) as relay:
        attempts = []

        def cut_once(version, model):
            attempts.append(version)
            parts = host.parts(version, model)
            yield next(parts)
            if len(attempts) == 1:
                relay.cut()
            yield from parts

        host.on_download = cut_once
        with connected(kind, relay.address) as client, client.episode() as episode:
            assert episode.act(seen(0)) == 0
            assert len(attempts) == 2
            assert client.stats.reconnects == 1


# -- uploads ---------------------------------------------------------------------------------------


def test_an_upload_without_an_answer_is_sent_again_as_it_was(kind, models):
    with ScriptedHost(models[1]) as host, Relay(host.address) as relay:

        def lost_once(request):
            host.on_upload = host.taken
            relay.cut()
            return host.taken(request)

        host.on_upload = lost_once
        with connected(kind, relay.address) as client:
            play(client, 3)
            first, second = host.next_upload(), host.next_upload()
            assert first == second
            eventually(lambda: client.stats.steps_uploaded == 3)


def test_what_the_server_does_not_want_now_is_sent_again(kind, models):
    with ScriptedHost(models[1]) as host, connected(kind, host.address) as client:

        def not_now(request):
            host.on_upload = host.taken
            raise Fault(Reason.NOT_READY, "later", retry_after_s=0.01)

        host.on_upload = not_now
        play(client, 3)
        assert host.next_upload() == host.next_upload()
        eventually(lambda: client.stats.steps_uploaded == 3)
        assert client.stats.asked_again == 1


def test_what_was_not_delivered_is_offered_to_the_next_server_as_resumed(kind, models):
    with ScriptedHost(models[1]) as host, Relay(host.address) as relay:
        host.on_upload = lambda request: pb.UploadEpisodesResponse(
            accepted_sequence=request.chunks[-1].sequence, delivered_sequence=1
        )
        with connected(kind, relay.address) as client, client.episode() as episode:
            for step in range(11):
                episode.act(seen(step))
            assert told(host.next_upload()) == [(1, 1, 0, 0.0)]
            for step in range(11, 21):
                episode.act(seen(step))
            assert told(host.next_upload()) == [(2, 1, 10, 10.0)]
            host.session, host.on_upload = "second", host.taken
            host.delivered = 1
            relay.cut()
            again = host.next_upload()
            assert told(again) == [(1, 2, 10, 10.0)]
            assert resumed(again) == {2}
            for step in range(21, 31):
                episode.act(seen(step))
            assert told(host.next_upload()) == [(2, 2, 20, 20.0)]
            assert client.stats.sessions_lost == 1
            assert client.stats.episodes_resumed == 1


def test_a_refused_chunk_ends_its_episode_there_and_the_rest_goes_on_as_another(
    kind, models, caplog
):
    with ScriptedHost(models[1]) as host, connected(kind, host.address) as client:

        def refuse_once(request):
            host.on_upload = host.taken
            response = host.taken(request)
            detail = Fault(Reason.STALE_POLICY, "too old").to_detail()
            response.faults.add(index=0, error=detail)
            return response

        host.on_upload = refuse_once
        with client.episode() as episode:
            for step in range(11):
                episode.act(seen(step))
            assert told(host.next_upload()) == [(1, 1, 0, 0.0)]
            eventually(lambda: client.stats.chunks_refused == 1)
            for step in range(11, 21):
                episode.act(seen(step))
            after = host.next_upload()
            assert told(after) == [(2, 2, 10, 10.0)]
            assert resumed(after) == {2}
        assert client.stats.steps_dropped == 10
        assert "too old" in caplog.text


def test_an_upload_that_is_refused_as_a_whole_is_not_repeated(kind, models, caplog):
    with ScriptedHost(models[1]) as host, connected(kind, host.address) as client:

        def refuse_once(request):
            host.on_upload = host.taken
            raise Fault(Reason.MALFORMED_TENSOR, "nonsense")

        host.on_upload = refuse_once
        play(client, 3)
        assert told(host.next_upload()) == [(1, 1, 0, 0.0)]
        eventually(lambda: client.stats.chunks_refused == 1)
        play(client, 3, 100)
        assert told(host.next_upload()) == [(1, 2, 0, 100.0)]
        assert "nonsense" in caplog.text


# -- servers that go away --------------------------------------------------------------------------


def go_away(relay, caplog):
    """Break all connections, let none be made, and wait until the client knows."""
    relay.open = False
    relay.cut()
    eventually(lambda: "acting on meanwhile" in caplog.text)


def test_the_client_acts_on_while_the_server_is_away_and_uploads_in_order(kind, caplog):
    with serving_alone(steps_per_upload=10) as server, Relay(server.address) as relay:
        with connected(kind, relay.address) as client:
            play(client, 5)
            go_away(relay, caplog)
            for number in range(1, 11):
                play(client, 50, 1000 * number)
            relay.open = True
            chunks = server.collect(505, timeout_s=PATIENCE_S)
        expected = [1000 * number + step for number in range(1, 11) for step in range(50)]
        assert rows_of(chunks) == [*range(5), *expected]
        assert client.stats.steps_dropped == 0


def test_whoever_waits_for_the_learner_acts_on_while_the_server_is_away(kind, caplog):
    with (
        serving_alone(hold=True, steps_per_upload=10) as server,
        Relay(server.address) as relay,
        connected(kind, relay.address) as client,
        client.episode() as episode,
    ):
        for step in range(10):
            episode.act(seen(step))
        waiting = threading.Thread(target=lambda: episode.act(seen(10)))
        waiting.start()
        eventually(lambda: server.ledger()["received"] == 10)
        assert waiting.is_alive()
        go_away(relay, caplog)
        waiting.join(PATIENCE_S)
        for step in range(11, 101):
            episode.act(seen(step))
        relay.open = True
        assert rows_of(server.collect(100, timeout_s=PATIENCE_S)) == list(range(100))
        server.publish(2, action=1)
        eventually(lambda: episode.act(seen(101)) == 1)


@pytest.mark.parametrize("on_disk", [False, True])
def test_beyond_its_bound_the_oldest_experience_is_lost_and_counted(
    kind, on_disk, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("client_sdk.spool.MEMORY_BYTES", 3000)
    settings = {"spool_bytes": 20_000, "spool_dir": tmp_path if on_disk else None}
    with serving_alone(steps_per_upload=10) as server, Relay(server.address) as relay:
        with connected(kind, relay.address, **settings) as client, client.episode() as episode:
            episode.act(seen(0))
            go_away(relay, caplog)
            for step in range(1, 2001):
                episode.act(seen(step), 1.0)
            dropped = client.stats.steps_dropped
            assert 1000 < dropped < 2000
            assert dropped % 10 == 0
            relay.open = True
            episode.end(seen(2001), 1.0, terminated=True)
            chunks = server.collect(2001 - dropped, timeout_s=PATIENCE_S)
        assert rows_of(chunks) == list(range(dropped, 2001))
        assert not chunks[-1].end.reported
        assert client.stats.episodes_resumed == 1


def test_a_server_that_stays_away_does_not_keep_the_client_from_closing(kind, caplog):
    hasty = Timeouts(connect_s=3.0, close_s=0.3)
    with serving_alone() as server, connected(kind, server.address, timeouts=hasty) as client:
        play(client, 3)
        server.collect(3)
        server.server.stop()
        play(client, 3)
    assert "last 3 steps" in caplog.text


def test_a_restarted_server_s_policy_is_taken_even_if_its_number_is_lower(kind, monkeypatch):
    monkeypatch.setattr("policy_server.policy_files._RESTORING_S", 0.1)
    with serving_alone(first_version=7) as server:
        port = int(server.address.rpartition(":")[2])
        client_of_both = connected(kind, server.address)
        client = client_of_both.__enter__()
        try:
            episode = client.episode()
            assert episode.act(seen(0)) == 0
            server.server.stop()
            with serving_alone(first_version=None, port=port) as restarted:
                restarted.publish(1, action=1)
                steps = iter(range(1, 10**9))
                eventually(lambda: episode.act(seen(next(steps))) == 1, 20.0)
                assert client.policy_version == 1
                # Experience of the policy that only the old server knew is refused, and no more.
                eventually(lambda: client.stats.chunks_refused > 0)
                play(client, 5, 5000)
                chunks = restarted.collect(5)
                assert {chunk.policy.version for chunk in chunks} == {1}
        finally:
            client_of_both.__exit__(None, None, None)


def test_a_restarted_server_is_offered_again_what_it_had_before_its_first_weights_are_there(kind):
    with serving_alone(steps_per_upload=10) as server:
        port = int(server.address.rpartition(":")[2])
        with connected(kind, server.address) as client:
            play(client, 20)
            eventually(lambda: client.stats.steps_uploaded == 20)  # nothing of it delivered
            server.server.stop()
            with serving_alone(first_version=None, port=port) as restarted:
                eventually(lambda: restarted.server.stats()["downloads_waiting"] == 2, PATIENCE_S)
                restarted.publish(1)  # as it was: its checkpoint says so
                chunks = restarted.collect(20, timeout_s=PATIENCE_S)
                assert rows_of(chunks) == list(range(20))
            assert client.stats.chunks_refused == client.stats.steps_dropped == 0


def test_another_kind_of_server_at_the_address_ends_it(kind):
    with serving_alone() as server:
        port = int(server.address.rpartition(":")[2])
        with connected(kind, server.address) as client, client.episode() as episode:
            episode.act(seen(0))
            server.server.stop()
            other = gym.spaces.Box(-1, 1, (7,), np.float32)
            with serving_alone(other, port=port):
                eventually(lambda: raises(SpaceMismatchError, lambda: episode.act(seen(1))), 20.0)


def raises(error, call):
    try:
        call()
    except error:
        return True
    return False


# -- the cache -------------------------------------------------------------------------------------


def test_a_cached_policy_is_not_downloaded_again_unless_it_is_damaged(kind, tmp_path):
    with serving_alone() as server:

        def act_once():
            with connected(kind, server.address, cache_dir=tmp_path) as client:
                play(client, 1)
            return server.server.stats()["policy_downloads"]

        act_once()
        (file,) = tmp_path.iterdir()
        before = file.read_bytes()
        file.write_bytes(before[:-1])
        act_once()
        assert file.read_bytes() == before


def test_a_cached_policy_is_taken_from_disk(kind, models, tmp_path):
    with ScriptedHost(models[1]) as host:
        with connected(kind, host.address, cache_dir=tmp_path) as client:
            play(client, 1)

        def header_alone(version, model):
            yield next(iter(host.parts(version, model)))
            raise Fault(Reason.INTERNAL, "nobody should have read on")

        host.on_download = header_alone
        with connected(kind, host.address, cache_dir=tmp_path) as client:
            play(client, 1)
            assert client.stats.policies_loaded == 1


# -- sizes -----------------------------------------------------------------------------------------


IMAGE = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)


def serving_images(**settings):
    return serving_alone(IMAGE, CARTPOLE_ACTIONS, FlattenObservations, **settings)


def test_an_episode_of_images_goes_up_in_messages_within_the_limit(kind):
    limit = 500_000
    with (
        serving_images(steps_per_upload=1000, max_message_bytes=limit) as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
    ):
        image = np.zeros(IMAGE.shape, np.uint8)
        for step in range(60):
            image[0, 0, 0] = step
            episode.act(image, float(step > 0))
        episode.end(image, 1.0, truncated=True)
        chunks = server.collect(60, timeout_s=PATIENCE_S)
    told = [
        int(batch.observations[""][row, 0, 0, 0]) for each in chunks for batch, row in each.rows
    ]
    assert told == list(range(60))
    assert max(chunk.steps for chunk in chunks) * 84 * 84 * 4 < limit


def test_an_observation_over_the_limit_is_refused_with_the_setting(kind):
    with (
        serving_images(max_message_bytes=50_000) as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
        pytest.raises(LimitExceededError, match="max_message_bytes"),
    ):
        episode.act(np.zeros(IMAGE.shape, np.uint8))
