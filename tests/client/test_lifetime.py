"""Threads, tasks, forks, forgotten clients, and what importing the client costs."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from client_sdk import AsyncPolicyClient, PolicyClient, PolicyTimeout, Timeouts, aio_remote_actor
from client_sdk.errors import (
    ClosedClientError,
    ConcurrentUseError,
    ForkedClientError,
    InvalidValueError,
    NotConnectedError,
)
from tests.client.acting_alone import serving_for
from tests.client.support import PATIENCE_S, QUICK, ScriptedServer, connected, seen
from tests.servers import serving

MODES = pytest.mark.parametrize("mode", ["remote", "local"])
BRIEF = Timeouts(connect_s=3.0, action_s=1.0, reconnect_s=1.0, close_s=0.3)


def run_python(code, *arguments, timeout=60, **environment):
    """That program in another process; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def serving_mode(mode, **settings):
    """A server for that inference mode."""
    return serving_for({"remote": "sync", "local": "local"}[mode], need_logp=False, **settings)


@pytest.mark.parametrize("module", ["client_sdk", "client_sdk.runner", "client_sdk.cli"])
def test_importing_the_client_loads_no_training_library(module):
    loaded = run_python(
        f"""
        import sys
        import {module}
        heavy = {{"ray", "torch", "onnxruntime", "onnx", "policy_server"}}
        print(*sorted(heavy & set(sys.modules)))
        """
    )
    assert loaded == ""


def test_a_second_thread_is_told_that_it_must_not(server):
    with PolicyClient(server.address, timeouts=QUICK) as client, client._guard:
        errors = []

        def intrude():
            try:
                client.start_episode()
            except ConcurrentUseError as error:
                errors.append(str(error))

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join(PATIENCE_S)
        assert "not thread-safe" in errors[0]


def test_a_client_may_be_handed_from_thread_to_thread(server):
    with PolicyClient(server.address, timeouts=QUICK) as client:
        episode_id = client.start_episode()
        for _ in range(3):
            thread = threading.Thread(target=client.get_action, args=(episode_id, seen(0)))
            thread.start()
            thread.join(PATIENCE_S)
        assert client.stats.requests == 3


def test_two_tasks_cannot_be_inside_one_episode():
    async def main(address):
        async with (
            AsyncPolicyClient(address, timeouts=QUICK) as client,
            client.episode() as episode,
        ):
            first = asyncio.create_task(episode.act(seen(0)))
            await asyncio.sleep(0)
            with pytest.raises(ConcurrentUseError, match="one call for an episode"):
                await episode.act(seen(0))
            await asyncio.to_thread(server.collect, 1, timeout_s=0.3)
            await first

    with serving(hold=True) as server:
        asyncio.run(main(server.address))


def test_tasks_share_an_asyncio_client(server):
    async def main():
        async with AsyncPolicyClient(server.address, timeouts=QUICK) as client:

            async def run(number):
                async with client.episode(f"{number}") as episode:
                    for step in range(10):
                        await episode.act(seen(step), float(step > 0))
                    await episode.end(seen(10), 1.0)

            await asyncio.gather(*map(run, range(100)))

    asyncio.run(main())
    assert server.ledger()["received"] == 1000


def test_a_cancelled_call_leaves_its_episode_and_the_others_usable():
    async def main(address):
        async with (
            AsyncPolicyClient(address, timeouts=QUICK) as client,
            client.episode() as episode,
        ):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await episode.act(seen(0))
            threading.Thread(target=server.collect, args=(1,), kwargs={"timeout_s": 5.0}).start()
            assert await episode.act(seen(0)) == 0
            await episode.end(seen(1), 1.0)
            assert client.stats.reconnects == 0

    with serving(hold=True) as server:
        asyncio.run(main(server.address))


def test_an_asyncio_client_belongs_to_the_loop_that_connected_it(server):
    client = AsyncPolicyClient(server.address, timeouts=QUICK)

    async def other():
        with pytest.raises(ConcurrentUseError, match="another event loop"):
            await client.start_episode()

    async def main():
        async with client:
            await client.start_episode()
            await asyncio.to_thread(asyncio.run, other())

    asyncio.run(main())


def test_an_asyncio_client_that_never_connected_says_so():
    async def main():
        client = AsyncPolicyClient("localhost:1")
        for call in (client.episode, lambda: client.episodes(2), lambda: client.observation_space):
            with pytest.raises(NotConnectedError, match="connect"):
                call()
        await client.close()

    asyncio.run(main())


@MODES
def test_a_forgotten_client_is_a_resource_warning(mode):
    def forget(server):
        PolicyClient(server.address, mode, timeouts=QUICK)
        gc.collect()

    with serving_mode(mode) as server, pytest.warns(ResourceWarning, match="never closed"):
        forget(server)


@MODES
def test_a_forgotten_asyncio_client_is_a_resource_warning(mode):
    async def main(server):
        await AsyncPolicyClient(server.address, mode, timeouts=QUICK).connect()
        gc.collect()

    with serving_mode(mode) as server, pytest.warns(ResourceWarning, match="never closed"):
        asyncio.run(main(server))


def test_a_client_that_never_connected_owes_no_close():
    with pytest.raises(InvalidValueError, match="address"):
        PolicyClient("nowhere")
    gc.collect()


def test_closing_makes_other_threads_fail_clearly(server):
    client = PolicyClient(server.address, timeouts=QUICK)
    client.close()
    with pytest.raises(ClosedClientError, match="closed"):
        client.ping()
    with pytest.raises(ClosedClientError), client:
        pass


FORK = """
    import os, sys, warnings
    import numpy as np
    from client_sdk import PolicyClient
    from client_sdk.errors import ForkedClientError

    client = PolicyClient(*sys.argv[1:])
    episode_id = client.start_episode()
    client.get_action(episode_id, np.zeros(4))
    child = os.fork()
    if child == 0:
        told = 0
        for call in (
            client.start_episode,
            lambda: client.get_action(episode_id, np.zeros(4)),
            client.ping,
            lambda: client.episode(),
        ):
            try:
                call()
            except ForkedClientError as error:
                told += "make a new PolicyClient" in str(error)
        client.close()
        del client
        os._exit(told)
    _, status = os.waitpid(child, 0)
    client.log_returns(episode_id, 1.0)
    client.get_action(episode_id, np.zeros(4))
    client.end_episode(episode_id, np.zeros(4))
    client.close()
    print(os.waitstatus_to_exitcode(status), client.stats.reconnects)
"""


@MODES
def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(mode):
    with serving_mode(mode) as server:
        assert run_python(FORK, server.address, mode) == "4 0"


ASYNC_FORK = """
    import asyncio, os, sys
    import numpy as np
    from client_sdk import AsyncPolicyClient
    from client_sdk.errors import ForkedClientError

    async def main():
        async with AsyncPolicyClient(*sys.argv[1:]) as client:
            episode_id = await client.start_episode()
            await client.get_action(episode_id, np.zeros(4))
            child = os.fork()
            if child == 0:
                try:
                    client.episode()
                except ForkedClientError:
                    os._exit(7)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            await client.get_action(episode_id, np.zeros(4))
            print(os.waitstatus_to_exitcode(status), client.stats.reconnects)

    asyncio.run(main())
"""


def test_a_forked_asyncio_client_says_so_too(server):
    # gRPC's own fork handlers crash children of a process whose threads are inside it.
    assert run_python(ASYNC_FORK, server.address, GRPC_ENABLE_FORK_SUPPORT="false") == "7 0"


@MODES
def test_a_program_that_forgets_to_close_still_ends(mode):
    code = """
        import sys, warnings
        import numpy as np
        warnings.simplefilter("ignore")
        from client_sdk import PolicyClient
        client = PolicyClient(*sys.argv[1:])
        client.get_action(client.start_episode(), np.zeros(4))
        print("done")
    """
    with serving_mode(mode) as server:
        assert run_python(code, server.address, mode) == "done"


@pytest.mark.parametrize("kind", ["sync", "local"])
def test_many_clients_come_and_go_without_leaving_threads(kind):
    with serving_for(kind) as server:
        _come_and_go(kind, server)


def _come_and_go(kind, server):
    def open_and_close():
        with connected(kind, server.address) as client:
            client.get_action(client.start_episode(), seen(0))

    open_and_close()
    before = threading.active_count()
    for _ in range(10):
        open_and_close()
    ended = threading.Event()
    for _ in range(200):
        if threading.active_count() <= before:
            break
        ended.wait(0.05)
    assert threading.active_count() <= before


def test_the_forked_error_names_the_cure():
    assert "fork" in (ForkedClientError.__doc__ or "")


INTERRUPTS = """
    import signal, sys, threading, time
    import numpy as np
    from client_sdk import PolicyClient

    with PolicyClient(*sys.argv[1:]):
        pass  # everything is imported: native modules bear no interrupt in the middle of that
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted, dropped, client = 0, 0, None
    for delay in range(60):
        signal.setitimer(signal.ITIMER_REAL, 0.02 + delay * 1e-4)
        until = time.monotonic() + 2.0
        try:
            with PolicyClient(*sys.argv[1:]) as client, client.episodes(2) as batch:
                while time.monotonic() < until:
                    batch.act(np.zeros((2, 4)), [1, 1])
            dropped += 1  # by Python, which ignores what is raised in a weak reference's callback
        except KeyboardInterrupt:
            interrupted += 1
        if client is not None and not client.closed:
            client.close()
    print(interrupted, dropped)
"""


@MODES
def test_an_interrupt_may_strike_anywhere(mode):
    # Nobody takes the experience, and there is more of it than a buffer holds.
    with serving_mode(mode, when_full="discard") as server:
        interrupted, dropped = map(int, run_python(INTERRUPTS, server.address, mode).split())
        assert interrupted + dropped == 60
        assert dropped <= 6
        assert server.unaccounted() == 0


CLOSED_BY_HANDLER = """
    import signal, sys
    import numpy as np
    from client_sdk import PolicyClient
    from client_sdk.errors import ClosedClientError

    client = PolicyClient(*sys.argv[1:])
    signal.signal(signal.SIGALRM, lambda *_: client.close())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        while True:
            client.get_action(client.start_episode(), np.zeros(4))
    except ClosedClientError:
        print("closed")
"""


@MODES
@pytest.mark.parametrize("hold", [True, False])
def test_a_signal_handler_may_close_the_client_under_a_call(mode, hold):
    with serving_mode(mode, hold=hold) as server:
        assert run_python(CLOSED_BY_HANDLER, server.address, mode, timeout=20) == "closed"


CLOSED_WITH_AN_END_ON_ITS_WAY = """
    import signal, sys
    import numpy as np
    from client_sdk import PolicyClient, Timeouts
    from client_sdk.errors import ClosedClientError

    client = PolicyClient(sys.argv[1], timeouts=Timeouts(close_s=0.5))
    ended = client.start_episode()
    client.get_action(ended, np.zeros(4))
    client.end_episode(ended, np.zeros(4))
    signal.signal(signal.SIGALRM, lambda *_: client.close())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        client.get_action(client.start_episode(), np.zeros(4))
    except ClosedClientError:
        print("closed")
"""


def test_a_signal_handler_may_close_the_client_that_waits_for_more_than_one_answer(scripted):
    first = iter([True])
    scripted.on_act = lambda request: scripted.answer(request) if next(first, False) else None
    assert run_python(CLOSED_WITH_AN_END_ON_ITS_WAY, scripted.address, timeout=20) == "closed"


def test_closing_releases_a_task_that_waits_for_a_row_nobody_else_waited_for():
    async def main(address):
        client = AsyncPolicyClient(address, timeouts=BRIEF)
        await client.connect()
        client._handshake.welcome_with_logp.add(False)
        episode = client.episode()
        await episode.log_action(seen(0), 1)
        waiting = asyncio.create_task(episode.log_action(seen(1), 1))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await client.close()
            with pytest.raises(ClosedClientError):
                await waiting

    with ScriptedServer() as server:
        server.on_act = lambda _: None
        asyncio.run(main(server.address))


def test_two_tasks_may_wait_for_one_answer(monkeypatch):
    monkeypatch.setattr(aio_remote_actor, "MAX_UNANSWERED", 0)

    async def main(address):
        async with AsyncPolicyClient(address, timeouts=BRIEF) as client:
            client._handshake.welcome_with_logp.add(False)
            oldest, other = client.episode(), client.episode()
            await oldest.log_action(seen(0), 1)
            crowded = asyncio.create_task(other.log_action(seen(0), 1))
            await asyncio.sleep(0)
            own = asyncio.create_task(oldest.log_action(seen(1), 1))
            await asyncio.sleep(0)
            crowded.cancel()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(PolicyTimeout):
                    await own
                with pytest.raises(asyncio.CancelledError):
                    await crowded

    with ScriptedServer() as server:
        server.on_act = lambda _: None
        asyncio.run(main(server.address))


def test_connecting_twice_at_once_opens_one_session(server):
    async def main():
        client = AsyncPolicyClient(server.address, timeouts=QUICK)
        await asyncio.gather(client.connect(), client.connect())
        assert server.server.stats()["sessions_opened"] == 1
        await client.close()

    asyncio.run(main())


def test_a_close_that_is_cancelled_lets_go_all_the_same():
    async def main(address):
        client = AsyncPolicyClient(address, timeouts=QUICK)
        await client.connect()
        client._handshake.welcome_with_logp.add(False)
        await client.episode().log_action(seen(0), 1)
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert client._actor._stream is None
        assert client._actor._reader.done()

    with ScriptedServer() as server:
        server.on_act = lambda _: None
        asyncio.run(main(server.address))
