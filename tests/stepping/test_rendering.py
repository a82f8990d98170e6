"""Frames: when they are drawn, who sees them, and what they are recorded to."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.errors import (
    EnvironmentFailedError,
    LimitExceededError,
    SpaceMismatchError,
    StepOutOfOrderError,
    WrongModeError,
)
from client_sdk.video import VideoFile
from client_sdk.viewer import Viewer
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.tensors import tensor_from_proto
from tests.stepping.support import PATIENCE_S, Mixed, Script, hosting, wait_for

WATCH = [sys.executable, "-m", "client_sdk.cli", "watch"]
SCREENLESS = {**os.environ, "SDL_VIDEODRIVER": "dummy"}


@pytest.fixture(autouse=True)
def readers_of_videos_survive_grpc(monkeypatch):
    """As ``VideoFile`` says of writers."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")


class Watcher:
    """Frames of a host, as another process would stream them."""

    def __init__(self, address, **request):
        self._connection = EnvConnection(Endpoint(Address.parse(address)))
        self._frames = self._connection.stream_frames(pb.StreamFramesRequest(**request), PATIENCE_S)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._frames.close()
        self._connection.disconnect()

    def next(self):
        return tensor_from_proto(next(self._frames).frame)


def test_frames_are_those_of_the_environment_and_drawn_only_when_asked_for():
    script = Script()
    with (
        hosting(script.make) as host,
        RemoteEnv(host.address, render_mode="rgb_array") as env,
    ):
        env.reset()
        for step in range(1, 4):
            env.step(0)
            assert script.count("render") == step - 1
            frame = env.render()
            assert (frame.dtype, frame.shape) == (np.uint8, (4, 6, 3))
            assert (frame == step).all()


def test_each_environment_of_a_vector_has_its_frame():
    with hosting(Mixed) as host:
        with RemoteVectorEnv(host.address, num_envs=3, render_mode="rgb_array") as envs:
            envs.reset(seed=1, options={"from": 2})
            assert [int(frame[0, 0, 0]) for frame in envs.render()] == [2, 2, 2]
        with RemoteVectorEnv(host.address, num_envs=2) as envs:
            envs.reset(seed=1)
            assert envs.render() is None


def test_without_a_render_mode_there_is_no_frame():
    with hosting(Mixed) as host, RemoteEnv(host.address) as env:
        env.reset(seed=1)
        assert env.render() is None
        assert env.metadata["render_modes"] == ["human", "rgb_array"]
        assert env.metadata["render_fps"] == 30


def test_rendering_before_the_first_reset_is_refused():
    with hosting(Mixed) as host, RemoteEnv(host.address, render_mode="rgb_array") as env:
        with pytest.raises(StepOutOfOrderError, match="reset first"):
            env.render()
        env.reset(seed=1)
        env.render()


def test_a_frame_that_is_none_is_the_failure_of_its_environment():
    script = Script(render=lambda: np.zeros((2, 2), np.uint8))
    with hosting(script.make) as host, RemoteEnv(host.address, render_mode="rgb_array") as env:
        env.reset()
        with pytest.raises(EnvironmentFailedError, match=r"expected uint8 \[height, width, 3\]"):
            env.render()


def test_human_mode_shows_each_step_on_this_side(monkeypatch):
    pytest.importorskip("pygame", reason="the extra `video`")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    script = Script()
    with hosting(script.make) as host, RemoteEnv(host.address, render_mode="human") as env:
        assert env.render_mode == "human"
        env.reset()
        env.step(0)
        assert env.render() is None
        assert script.count("render") == 3
        assert env._remote.viewer._window.get_at((5, 3))[:3] == (1, 1, 1)


def test_human_mode_without_pygame_says_what_to_install():
    code = """
import sys
sys.modules["pygame"] = None
from gymnasium.error import DependencyNotInstalled
from client_sdk import RemoteEnv
try:
    RemoteEnv("127.0.0.1:1", render_mode="human")
except DependencyNotInstalled as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert 'pip install "policy-server[video]"' in done.stdout


# -- watching


def test_a_watcher_sees_what_somebody_else_steps_and_disturbs_nothing():
    script = Script()
    with (
        hosting(script.make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
    ):
        env.reset()
        env.step(0)
        assert script.count("render") == 0
        with Watcher(host.address) as watcher:
            assert watcher.next()[0, 0, 0] == 1  # at once, before the next step
            env.step(0)
            assert watcher.next()[0, 0, 0] == 2
        # Nobody watches any more: nothing is drawn.
        wait_for(lambda: draws(env, script) == 0)


def draws(env, script):
    before = script.count("render")
    env.step(0)
    return script.count("render") - before


def test_a_slow_watcher_misses_frames_and_gets_the_newest():
    with (
        hosting(Script().make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
        Watcher(host.address) as watcher,
    ):
        env.reset()
        watcher.next()
        for _ in range(200):
            env.step(0)
        seen = [int(watcher.next()[0, 0, 0])]
        while seen[-1] != 200:
            seen.append(int(watcher.next()[0, 0, 0]))
        assert seen == sorted(seen)


def test_frames_come_no_more_often_than_asked_for():
    script = Script()
    with (
        hosting(script.make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
        Watcher(host.address, max_frames_per_second=0.01) as watcher,
    ):
        env.reset()
        watcher.next()
        for _ in range(50):
            env.step(0)
        assert script.count("render") <= 2


def test_a_watcher_may_come_first_and_stays_for_the_next_environment():
    with (
        hosting(Script().make, kwargs={"render_mode": "rgb_array"}) as host,
        Watcher(host.address) as watcher,
    ):
        seen = []

        def watch():
            seen.append(watcher.next())
            seen.append(watcher.next())

        watching = threading.Thread(target=watch)
        watching.start()
        for number in (1, 2):
            with RemoteEnv(host.address) as env:
                env.reset()
                wait_for(lambda number=number: len(seen) >= number or not watching.is_alive())
        watching.join(PATIENCE_S)
        assert len(seen) == 2


def test_a_watcher_sees_what_is_rendered_beside_what_is_not():
    with (
        hosting(Mixed) as host,
        RemoteEnv(host.address, render_mode="rgb_array") as env,
        RemoteEnv(host.address) as newer,
    ):
        env.reset(seed=1, options={"from": 7})
        newer.reset(seed=1)
        with Watcher(host.address) as watcher:
            assert watcher.next()[0, 0, 0] == 7


def test_a_watched_handle_that_closes_ends_its_stream():
    with hosting(Mixed) as host, RemoteEnv(host.address, render_mode="rgb_array") as env:
        env.reset(seed=1)
        with Watcher(host.address, env_handle=env._remote.driver.handle) as watcher:
            watcher.next()
            env.close()
            assert sum(1 for _ in watcher._frames) <= 1


def test_what_cannot_be_watched_says_why_and_goes_on():
    with hosting(Mixed) as host, RemoteEnv(host.address) as env:
        env.reset(seed=1)
        with (
            Watcher(host.address) as watcher,
            pytest.raises(WrongModeError, match=r"rgb_array.*--kwargs"),
        ):
            watcher.next()
        env.step(env.action_space.sample())
    with (
        hosting(Mixed, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
        Watcher(host.address, env_index=4) as watcher,
    ):
        env.reset(seed=1)
        with pytest.raises(SpaceMismatchError, match="expected 0 to 0, got 4"):
            watcher.next()


def test_too_many_watchers_are_refused_and_leave_room_when_they_go():
    with (
        hosting(Mixed, kwargs={"render_mode": "rgb_array"}, max_watchers=1) as host,
        RemoteEnv(host.address) as env,
    ):
        env.reset(seed=1)
        with Watcher(host.address) as first, Watcher(host.address) as second:
            first.next()
            with pytest.raises(LimitExceededError, match="max_watchers"):
                second.next()
            env.step(env.action_space.sample())

        def watched():
            with Watcher(host.address) as third:
                try:
                    third.next()
                except LimitExceededError:
                    return False
                return True

        wait_for(watched)


# -- the command


def test_it_records_a_video_that_can_be_played(tmp_path):
    imageio = pytest.importorskip("imageio", reason="the extra `video`")
    file = tmp_path / "run.mp4"
    script = Script(render=lambda: np.full((33, 47, 3), 200, np.uint8))
    with (
        hosting(script.make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
    ):
        env.reset()
        process = subprocess.Popen(
            [*WATCH, host.address, "--out", str(file), "--fps", "20", "--seconds", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None:
            env.step(0)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    first, last = out.splitlines()
    assert first == f"watching {host.address}; recording to {file}"
    frames = int(last.split()[1])
    assert last == f"wrote {frames} frames to {file}"
    assert 1 < frames <= 42
    with imageio.get_reader(file) as reader:
        pictures = [np.asarray(picture) for picture in reader]
    assert len(pictures) == frames
    assert pictures[0].shape == (34, 48, 3)  # even, for the players
    assert abs(int(pictures[0][5, 5, 0]) - 200) < 8
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("interrupt", "code"),
    [
        (lambda process: process.terminate(), 143),
        # A terminal's Ctrl-C is for all that was started there.
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_it_leaves_a_whole_file_when_it_is_interrupted(tmp_path, interrupt, code):
    imageio = pytest.importorskip("imageio", reason="the extra `video`")
    file = tmp_path / "run.mp4"
    script = Script(render=lambda: np.zeros((32, 32, 3), np.uint8))
    with (
        hosting(script.make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
    ):
        env.reset()
        process = subprocess.Popen(
            [*WATCH, host.address, "--out", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            with stepping(env):
                assert process.stdout.readline().endswith(f"recording to {file}\n")
                interrupt(process)
                out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    with imageio.get_reader(file) as reader:
        assert f"wrote {sum(1 for _ in reader)} frames" in out


def test_a_video_whose_encoder_dies_is_an_error_and_leaves_no_file(tmp_path):
    pytest.importorskip("imageio", reason="the extra `video`")
    video = VideoFile(tmp_path / "run.mp4", fps=30)
    frame = np.zeros((512, 512, 3), np.uint8)  # more than a pipe holds
    others = set(psutil.Process().children())
    video.add(frame)
    (encoder,) = set(psutil.Process().children()) - others
    encoder.kill()
    with pytest.raises(OSError, match="pipe"):
        video.add(frame)
    video.close()
    assert video.frames == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [["--out", "run.mp4"], []])
def test_a_wait_for_frames_is_told_and_one_in_vain_is_no_success(tmp_path, out):
    pytest.importorskip("imageio", reason="the extra `video`")
    with hosting("CartPole-v1") as host:  # and nobody steps it
        done = subprocess.run(
            [*WATCH, host.address, *out, "--seconds", "1.5"],
            cwd=tmp_path,
            env=SCREENLESS,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"waiting at {host.address} for somebody to step" in done.stderr
    assert "no frame came" in done.stderr
    assert ("run.mp4 is not written" in done.stderr) == bool(out)
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_somebody_closes_is_noticed(monkeypatch):
    pygame = pytest.importorskip("pygame", reason="the extra `video`")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    viewer = Viewer(Address.parse("a:1"))
    frame = np.zeros((4, 6, 3), np.uint8)
    viewer.show(frame, fps=None)
    assert not viewer.dismissed
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert viewer.dismissed
    viewer.show(frame, fps=None)
    viewer.close()


def test_without_a_display_it_says_that_nobody_sees_the_frames(monkeypatch, caplog):
    pytest.importorskip("pygame", reason="the extra `video`")
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")  # what SDL takes where there is no other
    viewer = Viewer(Address.parse("a:1"))
    viewer.show(np.zeros((4, 6, 3), np.uint8), fps=None)
    viewer.close()
    assert "no display here" in caplog.text


@contextlib.contextmanager
def stepping(env):
    """Steps it in another thread for as long as the block lasts."""
    done = threading.Event()

    def step():
        while not done.is_set():
            env.step(0)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE_S)


def test_it_shows_frames_until_the_host_ends():
    pytest.importorskip("pygame", reason="the extra `video`")
    script = Script()
    with (
        hosting(script.make, kwargs={"render_mode": "rgb_array"}) as host,
        RemoteEnv(host.address) as env,
    ):
        env.reset()
        process = subprocess.Popen(
            [*WATCH, host.address],
            env=SCREENLESS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with stepping(env):
                assert process.stdout.readline() == f"watching {host.address}\n"
            host.stop()
            _, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert "the host is gone" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 2, "host:port"),
        (["a:1", "--out", "run.gif"], 2, ".mp4"),
        (["a:1", "--out", "/none/run.mp4"], 2, "/none"),
        (["a:1", "--fps", "inf"], 2, "--fps: expected a number from 0.1 to 1000, got 'inf'"),
        (["a:1", "--seconds", "inf"], 2, "--seconds: expected a positive number of seconds"),
        (["a:1", "--index", "-1"], 2, "--index: expected a whole number from 0 to"),
        (["a:1", "--index", "first"], 2, "--index"),
        (["a:1", "--index", "4294967296"], 2, "--index"),
        (["127.0.0.1:1"], 1, "nobody listens"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, code, says):
    pytest.importorskip("imageio", reason="the extra `video`")
    done = subprocess.run(
        [*WATCH, *arguments],
        env=SCREENLESS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
