"""What the client does with answers that the real server gives seldom, or never."""

import dataclasses
import logging
import threading

import numpy as np
import pytest

from client_sdk import BatchError, PolicyTimeout, Timeouts
from client_sdk.errors import (
    DrainingError,
    EpisodeEndedError,
    IncompatibleProtocolError,
    InternalServerError,
    LimitExceededError,
    NotFiniteError,
    NotReadyError,
    PolicyClientError,
    SpaceMismatchError,
    UnauthenticatedError,
)
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from tests.client.support import (
    PATIENCE_S,
    QUICK,
    ScriptedServer,
    all_seen,
    connect_once,
    connected,
    seen,
    with_faults,
)

HASTY = Timeouts(connect_s=1.0, action_s=0.3, reconnect_s=1.0, close_s=0.5)


@pytest.fixture
def client(kind, scripted):
    with connected(kind, scripted.address) as client:
        yield client


def refusing(scripted, *faults):
    """A script that refuses the first row so many times, and then answers."""
    left = list(faults)

    def on_act(request):
        answer = scripted.answer(request)
        return with_faults(answer, {0: left.pop(0)}) if left else answer

    return on_act


def raising(scripted, *faults):
    """The same with whole requests."""
    left = list(faults)

    def on_act(request):
        if left:
            raise left.pop(0)
        return scripted.answer(request)

    return on_act


NOT_READY = Fault(Reason.NOT_READY, "learning")


@pytest.mark.parametrize("script", [refusing, raising])
def test_not_ready_is_asked_again_with_the_same_request(client, scripted, script):
    scripted.on_act = script(scripted, NOT_READY, NOT_READY)
    with client.episode() as episode:
        assert episode.act(seen(0)) == 0
        first, second, third = (scripted.next_asked() for _ in range(3))
        assert first == second == third
        assert client.stats.asked_again == 2
        assert client.stats.requests == 1


@pytest.mark.parametrize("script", [refusing, raising])
def test_a_server_that_stops_is_left_at_once(client, scripted, script, caplog):
    stopping = Fault(Reason.DRAINING, "the server is stopping", retry_after_s=PATIENCE_S)
    scripted.on_act = script(scripted, stopping)
    with client.episode() as episode:
        assert episode.act(seen(0)) == 0
    assert client.stats.reconnects == 1
    assert "lost (the server is stopping); connecting again" in caplog.text
    assert scripted.next_asked() == scripted.next_asked()


@pytest.mark.parametrize("script", [refusing, raising])
def test_a_limit_that_names_a_delay_is_waited_for(client, scripted, script):
    scripted.on_act = script(scripted, Fault(Reason.LIMIT_EXCEEDED, "full", retry_after_s=0.01))
    with client.episode() as episode:
        assert episode.act(seen(0)) == 0


def test_a_limit_without_a_delay_is_raised(client, scripted):
    scripted.on_act = refusing(scripted, Fault(Reason.LIMIT_EXCEEDED, "too many"))
    with client.episode() as episode:
        with pytest.raises(LimitExceededError, match="too many"):
            episode.act(seen(0))
        assert episode.act(seen(0)) == 0


def test_a_server_that_is_never_ready_is_a_timeout_that_says_why(kind, scripted):
    scripted.on_act = refusing(scripted, *[NOT_READY] * 1000)
    # Time for an answer, however busy the machine is.
    timeouts = dataclasses.replace(HASTY, action_s=3.0)
    with connected(kind, scripted.address, timeouts=timeouts) as client:
        episode = client.episode()
        with pytest.raises(PolicyTimeout, match="action_s") as caught:
            episode.act(seen(0))
        assert isinstance(caught.value.__cause__, NotReadyError)
        scripted.on_act = scripted.answer
        assert episode.act(seen(0)) == 0


def test_calling_again_after_a_timeout_waits_for_the_same_step(kind, scripted):
    late = threading.Event()

    def on_act(request):
        late.wait(5)
        return scripted.answer(request)

    scripted.on_act = on_act
    with connected(kind, scripted.address, timeouts=HASTY) as client:
        episode = client.episode()
        with pytest.raises(PolicyTimeout, match="same step"):
            episode.act(seen(1))
        late.set()
        assert episode.act(seen(2), 5.0) == 0
        asked = scripted.next_asked()
        while not scripted.asked.empty():  # the blocking client says it again, on another stream
            assert scripted.next_asked() == asked
        episode.act(seen(3), 1.0)
        (rows,) = scripted.next_asked().act.groups
        assert list(rows.steps) == [1]
        assert list(rows.rewards) == [1.0]


def test_a_refused_row_leaves_the_episode_where_it_was(client, scripted):
    with client.episode() as episode:
        episode.act(seen(0))
        scripted.next_asked()
        scripted.on_act = refusing(scripted, Fault(Reason.NOT_FINITE, "got nan", "groups[0]"))
        episode.log_returns(1.0, {"speed": 2.0})
        with pytest.raises(NotFiniteError, match="got nan"):
            episode.act(seen(1))
        refused = scripted.next_asked()
        episode.act(seen(1), 0.5)
        again = scripted.next_asked()
        assert list(again.act.groups[0].steps) == list(refused.act.groups[0].steps) == [1]
        assert list(again.act.groups[0].rewards) == [1.5]
        assert again.act.metrics == refused.act.metrics


def test_refused_rows_of_a_batch_do_not_cost_their_neighbours(client, scripted):
    with client.episodes(3) as batch:
        batch.act(all_seen(0, 1, 2))
        first = scripted.next_asked()
        scripted.on_act = lambda request: with_faults(
            scripted.answer(request), {1: Fault(Reason.EPISODE_ENDED, "it has ended")}
        )
        with pytest.raises(BatchError, match="row 1: it has ended") as caught:
            batch.act(all_seen(0, 1, 2), [1, 1, 1])
        scripted.next_asked()
        assert isinstance(caught.value.rows[1], EpisodeEndedError)
        assert caught.value.actions.tolist() == [0, 0, 0]
        scripted.on_act = scripted.answer
        batch.act(all_seen(0, 1, 2), [1, 1, 1])
        after = scripted.next_asked()
    kept, anew = first.act.groups[0].episodes, after.act.groups[0].episodes
    assert (anew[0], anew[2]) == (kept[0], kept[2])
    assert list(after.act.groups[0].steps) == [2, 0, 2]
    assert list(after.act.groups[0].rewards) == [1, 0, 1]
    assert [(start.episode, start.resumed) for start in after.act.starts] == [(anew[1], True)]


def test_a_refused_logged_action_is_told_by_the_next_call(client, scripted):
    with client.episode() as episode:
        episode.log_action(seen(0), 1)
        scripted.on_act = refusing(scripted, Fault(Reason.SPACE_MISMATCH, "no such action"))
        episode.log_action(seen(1), 1, reward=1.0)
        with pytest.raises(SpaceMismatchError, match="no such action"):
            episode.act(seen(2))
        for _ in range(2):
            scripted.next_asked()
        episode.act(seen(2))
        (rows,) = scripted.next_asked().act.groups
        assert list(rows.steps) == [1]
        assert list(rows.rewards) == [1.0]


def test_a_refused_end_is_logged(client, scripted, caplog):
    with client.episode("level 3") as episode:
        episode.act(seen(0))
        scripted.on_act = refusing(scripted, Fault(Reason.STEP_OUT_OF_ORDER, "not that step"))
        with caplog.at_level(logging.WARNING, "client_sdk"):
            episode.end(seen(1))
            client.close()
    assert "'level 3': not that step" in caplog.text
    assert client.stats.rows_refused == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: b"\xff\xff\xff",
        lambda request: pb.StreamActResponse(request=request.request, act=pb.ActResponse()),
        lambda request: pb.StreamActResponse(
            request=request.request, act=pb.ActResponse(groups=[pb.ActionRows()])
        ),
    ],
    ids=["garbage", "no group", "no action"],
)
@pytest.mark.parametrize("acted", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_an_answer_that_breaks_the_contract_is_an_error_and_no_hang(
    client, scripted, answer, acted, others
):
    for _ in range(others):
        client.start_episode()
    episode_id = client.start_episode()
    if acted:
        client.get_action(episode_id, seen(0))
    scripted.on_act = answer
    with pytest.raises(InternalServerError):
        client.get_action(episode_id, seen(1))
    scripted.on_act = scripted.answer
    assert client.get_action(episode_id, seen(1)) == 0


def test_an_answer_of_the_wrong_shape_is_an_error(client, scripted):
    def on_act(request):
        response = scripted.answer(request)
        response.act.groups[0].actions.leaves[""].shape[0] = 7
        return response

    scripted.on_act = on_act
    with pytest.raises(PolicyClientError, match="actions"):
        client.get_action(client.start_episode(), seen(0))


@pytest.mark.parametrize("others", [0, 1])
def test_answers_to_nobody_are_ignored(client, scripted, others):
    def on_act(request):
        answer = scripted.answer(request)
        stray = pb.StreamActResponse(request=999, act=answer.act)
        return [stray, answer, stray]

    for _ in range(others):
        client.start_episode()
    scripted.on_act = on_act
    with client.episode() as episode:
        for step in range(5):
            assert episode.act(seen(step)) == 0
    assert client.stats.reconnects == 0


@pytest.mark.parametrize("others", [0, 1])
def test_a_session_that_the_server_forgot_under_a_call_is_opened_again(client, scripted, others):
    for _ in range(others):
        client.start_episode()
    with client.episode() as episode:
        for step in range(2):
            episode.act(seen(step))
        scripted.on_act = raising(scripted, Fault(Reason.UNKNOWN_SESSION, "who?"))
        assert episode.act(seen(2)) == 0
    assert len(scripted.hellos) == 2


def test_options_are_announced_with_the_first_row_only(client, scripted):
    with client.episode("x", training_enabled=False, explore=False) as episode:
        episode.act(seen(0))
        episode.act(seen(0))
    first, second = scripted.next_asked(), scripted.next_asked()
    (start,) = first.act.starts
    assert (start.episode, start.label) == (first.act.groups[0].episodes[0], "x")
    assert (start.evaluation, start.greedy, start.resumed) == (True, True, False)
    assert not second.act.starts


def test_an_ordinary_episode_needs_no_announcement(client, scripted):
    client.get_action(client.start_episode(), seen(0))
    assert not scripted.next_asked().act.starts


def test_another_major_of_the_protocol_is_refused_and_another_minor_works(kind, scripted):
    connect_once(kind, scripted.address)  # it speaks 1.7

    def on_open(hello):
        response = scripted.welcome(hello)
        response.protocol_version = "2.0"
        return response

    scripted.on_open = on_open
    with pytest.raises(IncompatibleProtocolError, match=r"2\.0.*1\.0"):
        connect_once(kind, scripted.address)


def test_a_server_of_many_agents_is_refused_by_this_single_agent_client(kind, scripted):
    def on_open(hello):
        response = scripted.welcome(hello)
        response.agents["left"].CopyFrom(response.agents[""])
        del response.agents[""]
        return response

    scripted.on_open = on_open
    with pytest.raises(SpaceMismatchError, match="left"):
        connect_once(kind, scripted.address)


def test_a_refusal_of_the_token_is_final(kind, scripted):
    def on_open(hello):
        raise Fault(Reason.UNAUTHENTICATED, "the token is wrong")

    scripted.on_open = on_open
    with pytest.raises(UnauthenticatedError, match="token is wrong"):
        connect_once(kind, scripted.address, token="secret")
    assert len(scripted.hellos) == 1
    assert scripted.metadata[0]["authorization"] == "Bearer secret"


def test_a_full_server_is_asked_again_when_it_said(kind, scripted):
    def on_open(hello):
        if len(scripted.hellos) < 3:
            raise Fault(Reason.LIMIT_EXCEEDED, "max_sessions", retry_after_s=0.05)
        return scripted.welcome(hello)

    scripted.on_open = on_open
    connect_once(kind, scripted.address)
    assert len(scripted.hellos) == 3


def test_a_server_that_never_gets_ready_is_told_as_such(kind, scripted):
    def on_open(hello):
        raise Fault(Reason.DRAINING, "the server is stopping")

    scripted.on_open = on_open
    with pytest.raises(DrainingError, match="stopping"):
        connect_once(kind, scripted.address, timeouts=HASTY)


def test_what_a_server_said_before_it_fell_silent_is_told(kind, scripted):
    silence = threading.Event()

    def on_open(hello):
        if len(scripted.hellos) > 1:
            silence.wait(PATIENCE_S)
        raise Fault(Reason.DRAINING, "the server is stopping")

    scripted.on_open = on_open
    try:
        with pytest.raises(DrainingError, match="stopping"):
            connect_once(kind, scripted.address, timeouts=HASTY)
    finally:
        silence.set()


def test_a_redirection_is_followed(kind, scripted):
    with ScriptedServer() as front:

        def on_open(hello):
            response = front.welcome(hello)
            response.session_id, response.redirect_address = "", scripted.address
            return response

        front.on_open = on_open
        with connected(kind, front.address) as client:
            client.get_action(client.start_episode(), seen(0))
    assert len(front.hellos) == len(scripted.hellos) == 1
    assert scripted.asked.qsize() == 1


def test_a_circle_of_redirections_ends(kind, scripted):
    def on_open(hello):
        response = scripted.welcome(hello)
        response.redirect_address = scripted.address
        return response

    scripted.on_open = on_open
    with pytest.raises(PolicyClientError, match="more than 3"):
        connect_once(kind, scripted.address)


def test_the_session_is_named_in_messages_and_nowhere_else(kind, scripted, caplog):
    with caplog.at_level(logging.DEBUG), connected(kind, scripted.address) as client:
        client.get_action(client.start_episode(), seen(0))
        assert "secret-1" not in repr(client)
        assert "secret-1" not in repr(client._session)
    assert scripted.next_asked().act.session_id == "secret-1"
    assert [goodbye.session_id for goodbye in scripted.goodbyes] == ["secret-1"]
    assert "secret-1" not in caplog.text


def test_a_new_server_with_other_spaces_is_refused(kind, scripted):
    with connected(kind, scripted.address, timeouts=QUICK) as client:
        episode = client.episode()
        episode.act(seen(0))

        def on_open(hello):
            response = scripted.welcome(pb.OpenSessionRequest(session_id="secret-2"))
            response.agents[""].observation_space.box.shape[0] = 7
            return response

        scripted.on_open = on_open
        scripted.on_act = raising(scripted, Fault(Reason.UNKNOWN_SESSION, "who?"))
        with pytest.raises(SpaceMismatchError, match="observation_space"):
            episode.act(seen(1))


def test_many_ended_episodes_are_acknowledged_before_closing_forgets_them(client, scripted):
    for _ in range(400):
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        client.end_episode(episode_id, seen(1))
    client.close()
    told = [scripted.next_asked() for _ in range(800)]
    ends = [rows for each in told for rows in each.act.groups if list(rows.statuses) == [2]]
    assert len(ends) == 400


def test_observations_are_sent_as_they_were_when_the_call_was_made(client, scripted):
    observation = np.zeros(4, np.float32)
    episode = client.episode()
    episode.log_action(observation, 1)
    episode.log_action(observation, 1)
    observation[:] = 9.0
    first, second = scripted.next_asked(), scripted.next_asked()
    assert (
        first.act.groups[0].observations.leaves[""].data
        == second.act.groups[0].observations.leaves[""].data
        == bytes(16)
    )


FULL = Fault(Reason.LIMIT_EXCEEDED, "max_open_episodes=1", retry_after_s=0.05)


def test_a_first_row_that_was_put_off_is_not_repeated_once_taken_back(kind, scripted):
    scripted.on_act = refusing(scripted, *[FULL] * 1000)
    with connected(kind, scripted.address, timeouts=HASTY) as client:
        with client.episode() as episode, pytest.raises(PolicyTimeout):
            episode.act(seen(0))
        with client.episodes(2) as batch, pytest.raises(PolicyTimeout):
            batch.act(all_seen(0, 1))
        scripted.on_act = scripted.answer
        with client.episode() as last:
            last.act(seen(7))
        client.close()
        running: set[int] = set()
        while not scripted.asked.empty():
            (rows,) = scripted.next_asked().act.groups
            for number, status in zip(
                rows.episodes, rows.statuses or [1] * len(rows.episodes), strict=True
            ):
                (running.discard if status == 4 else running.add)(number)
        assert running == set()


def test_waiting_at_a_limit_is_logged_once_with_what_the_server_says(client, scripted, caplog):
    scripted.on_act = refusing(scripted, *[FULL] * 3)
    with caplog.at_level(logging.WARNING, "client_sdk"):
        client.get_action(client.start_episode(), seen(0))
    assert caplog.text.count("max_open_episodes=1") == 1
