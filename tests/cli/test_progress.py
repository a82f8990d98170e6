"""What a person sees of a training run."""

import io
import math

import pytest
from rich.console import Console
from rich.live import Live

from policy_server.commands.learning_curve import draw_learning_curve
from policy_server.commands.progress import (
    LiveDisplay,
    PlainLines,
    Progress,
    ReturnWindow,
    open_display,
    progress_of,
)

SHOWN = ("iteration", "env steps", "steps/s", "simulators", "mean return", "policy version")


def progress(**changes):
    values = {
        "iteration": 7,
        "env_steps": 28_000,
        "wall_s": 14.0,
        "steps_per_s": 2100.4,
        "simulators": 2,
        "mean_return": 123.4,
        "min_return": 20.0,
        "max_return": 500.0,
        "policy_version": 8,
    }
    return Progress(**{**values, **changes})


def result(**runners):
    return {
        "training_iteration": 3,
        "num_env_steps_sampled_lifetime": 12_000,
        "env_runners": {
            "num_episodes": 30,
            "episode_return_mean": 50.0,
            "episode_return_min": 10.0,
            "episode_return_max": 90.0,
            "policy_server": {"sessions": 4, "policy_version": 3},
            **runners,
        },
    }


def test_result_becomes_progress():
    before = progress(env_steps=8_000, wall_s=4.0)
    now = progress_of(result(), before, 6.0, ReturnWindow())
    assert now.iteration == 3
    assert now.env_steps == 12_000
    assert now.steps_per_s == pytest.approx(2_000)
    assert now.simulators == 4
    assert now.mean_return == 50.0
    assert now.policy_version == 3


def test_result_before_the_first_episode_is_shown_too():
    bare = {"training_iteration": 1, "env_runners": {}}
    now = progress_of(bare, None, 0.0, ReturnWindow())
    assert math.isnan(now.mean_return)
    assert "mean return        -" in now.line()


def test_mean_return_is_over_enough_episodes_to_stop_on():
    window = ReturnWindow(episodes=10)
    assert math.isnan(window.add(0, math.nan))
    assert window.add(30, 20.0) == 20.0
    assert window.add(2, 500.0) == pytest.approx((30 * 20 + 2 * 500) / 32)
    assert window.add(8, 300.0) == pytest.approx((2 * 500 + 8 * 300) / 10)
    assert window.add(12, 100.0) == 100.0


def test_plain_lines_name_every_figure():
    out = io.StringIO()
    PlainLines(out).show(progress())
    (line,) = out.getvalue().splitlines()
    for name in SHOWN:
        assert name in line
    assert "28,000" in line
    assert "123.4" in line


def test_anything_but_a_terminal_gets_plain_lines():
    out = io.StringIO()
    with open_display("PPO on CartPole-v1", 450, out=out) as display:
        display.say("policy server listening on 127.0.0.1:9900")
        display.show(progress())
        display.conclude(progress())
    first, second = out.getvalue().splitlines()
    assert first == "policy server listening on 127.0.0.1:9900"
    assert second.startswith("iteration")


def test_quiet_says_only_what_must_be_said():
    out = io.StringIO()
    with open_display("PPO", None, quiet=True, out=out) as display:
        display.show(progress())
        display.conclude(progress())
        display.say("checkpoint: here")
    last, checkpoint = out.getvalue().splitlines()
    assert last == progress().line()
    assert checkpoint == "checkpoint: here"


def test_terminal_gets_a_panel_with_every_figure():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Live(console=console, auto_refresh=False) as live:
        display = LiveDisplay(live, "PPO on CartPole-v1", 450)
        with console.capture() as starting:
            console.print(display)
        display.say("policy server listening on 127.0.0.1:9900")
        with console.capture() as waiting:
            console.print(display)
        display.show(progress())
        with console.capture() as capture:
            console.print(display)
    assert "starting" in starting.get()
    assert "waiting for the first experience" in waiting.get()
    for name in SHOWN:
        assert name in capture.get()
    assert "of 450" in capture.get()


def test_learning_curve_is_a_png(tmp_path):
    history = [
        progress(iteration=i, env_steps=4000 * i, wall_s=2.0 * i, mean_return=20.0 * i)
        for i in range(1, 20)
    ]
    path = tmp_path / "new" / "curve.png"
    draw_learning_curve(path, history, "PPO on CartPole-v1", goal=450)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["curve.png"]


def test_learning_curve_of_a_run_without_an_episode_says_so(tmp_path):
    path = tmp_path / "curve.png"
    draw_learning_curve(path, [progress(mean_return=math.nan)], "PPO")
    assert path.read_bytes().startswith(b"\x89PNG")
