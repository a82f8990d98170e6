"""Messages and bytes are counted as they are: what gRPC hands over, no more and no less."""

from client_sdk.wire import policyserver_pb2 as pb
from tests.server.talk import Talker, rows, seen
from tests.servers import serving


def traffic(server):
    return {
        name: number
        for name, number in server.server.stats().items()
        if name.startswith(("messages_", "bytes_"))
    }


def test_every_message_of_calls_and_streams_is_counted_with_its_size():
    with serving() as server, Talker(server.address, connect=False) as talker:
        assert set(traffic(server).values()) == {0}
        hello = pb.OpenSessionRequest(
            client_name="tester",
            protocol_version="1.0",
            inference_mode=pb.INFERENCE_MODE_REMOTE,
        )
        sent, received = [hello], [talker.stub.OpenSession(hello, timeout=5)]
        talker.session_id = received[0].session_id
        sent.append(talker.request(rows([1], [0], seen(0))))
        received.append(talker.stub.Act(sent[-1], timeout=5))
        stream = talker.stream()
        for step in range(1, 4):
            group = rows([1], [step], seen(step), rewards=[1.0])
            received.append(stream.ask(group))
            sent.append(pb.StreamActRequest(request=step, act=talker.request(group)))
        assert traffic(server) == {
            "messages_received": 5,
            "bytes_received": sum(message.ByteSize() for message in sent),
            "messages_sent": 5,
            "bytes_sent": sum(message.ByteSize() for message in received),
        }
