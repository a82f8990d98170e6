"""Every training, from the command line as a person would run it: writes docs/results.md.

    python -m benchmarks.results

Each training is a `policy-server train` and a `policy-client run` in processes of their own, until
its goal or its bound. `make test-slow` runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
COMMAND = "make test-slow"
TIMEOUT_S = 600.0

_NET = '--set=model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": true}'
_PPO = (
    *("--algo", "PPO", "--set=lr=0.0003", "--set=train_batch_size_per_learner=4000"),
    *("--set=minibatch_size=128", "--set=num_epochs=6", "--set=vf_loss_coeff=0.01", _NET),
)
_DQN = (
    *("--algo", "DQN", "--set=lr=0.001", "--set=train_batch_size=64", "--set=n_step=3"),
    *("--set=epsilon=[[0, 1.0], [10000, 0.02]]", "--set=target_network_update_freq=500"),
    *("--set=num_steps_sampled_before_learning_starts=1000", "--set=training_intensity=4"),
    '--set=replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 50000}',
    *("--set=rollout_fragment_length=64", "--set=min_sample_timesteps_per_iteration=2000"),
    '--set=model_config={"fcnet_hiddens": [64, 64]}',
)
# One update for each step, so an update must be cheap: small networks, small batches.
_SAC_NET = {
    "fcnet_hiddens": [64, 64],
    "fcnet_activation": "relu",
    "fusionnet_hiddens": [64, 64],
    "fusionnet_activation": "relu",
}
_SAC = (
    *("--algo", "SAC", "--set=actor_lr=0.001", "--set=critic_lr=0.001", "--set=alpha_lr=0.001"),
    *("--set=train_batch_size_per_learner=64", "--set=training_intensity=32", "--set=n_step=1"),
    *("--set=num_steps_sampled_before_learning_starts=500", "--set=min_time_s_per_iteration=0"),
    *("--set=min_sample_timesteps_per_iteration=800", f"--set=model_config={json.dumps(_SAC_NET)}"),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """One row of the table."""

    name: str
    env: str
    goal: float
    options: tuple[str, ...]
    envs: int = 8
    max_steps: int = 300_000
    inference: str = "remote"

    def arguments(self) -> list[str]:
        """Of ``policy-server train``."""
        goal = ["--stop-return", f"{self.goal:g}", "--stop-steps", str(self.max_steps)]
        return ["train", "--env", self.env, *goal, *self.options]


TRAININGS = (
    *(
        Training(f"PPO, hold, seed {seed}", "CartPole-v1", 450, (*_PPO, f"--seed={seed}"))
        for seed in (1, 2, 3)
    ),
    Training("PPO, hold, in the training process", "CartPole-v1", 450,
             (*_PPO, "--seed=1", "--num-env-runners=0")),
    Training("PPO, serve", "CartPole-v1", 450, (*_PPO, "--seed=1", "--while-learning=serve")),
    Training("PPO, one simulator", "CartPole-v1", 450, (*_PPO, "--seed=1"), envs=1),
    Training("DQN, serve", "CartPole-v1", 150, (*_DQN, "--seed=1")),
    Training("PPO, three actions", "Acrobot-v1", -100, (*_PPO, "--seed=1")),
    Training("SAC, serve", "Pendulum-v1", -250, (*_SAC, "--seed=1"), envs=4, max_steps=30_000),
    Training("PPO, hold, local", "CartPole-v1", 450, (*_PPO, "--seed=1"), inference="local"),
    Training("PPO, serve, local", "CartPole-v1", 450,
             (*_PPO, "--seed=1", "--while-learning=serve"), inference="local"),
    Training("DQN, serve, local", "CartPole-v1", 150, (*_DQN, "--seed=1"), inference="local"),
    Training("SAC, serve, local", "Pendulum-v1", -250, (*_SAC, "--seed=1"), envs=4,
             max_steps=30_000, inference="local"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    training: Training
    exit_code: int
    mean_return: float
    env_steps: int
    wall_s: float

    @property
    def reached(self) -> bool:
        """Whether it got to its goal within its bound."""
        return self.exit_code == 0 and self.mean_return >= self.training.goal


def run(training: Training) -> Outcome:
    """Train once."""
    with tempfile.TemporaryDirectory() as directory:
        address_file = Path(directory) / "address"
        server = [
            *(sys.executable, "-m", "policy_server.cli", *training.arguments(), "--quiet"),
            *("--port", "0", "--address-file", str(address_file)),
            *("--checkpoint-dir", directory, "--checkpoint-every", "1000000"),
        ]
        trainer = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
        try:
            if trainer.stdout is None:
                raise RuntimeError("the training's output is not piped")
            while trainer.poll() is None and "listening on" not in trainer.stdout.readline():
                pass
            with simulators(training, address_file):
                exit_code = trainer.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            exit_code = -1
        finally:
            trainer.kill()
            trainer.communicate()
        history = _history(Path(directory))
    if not history:
        return Outcome(training, exit_code or -1, float("nan"), 0, 0.0)
    last = history[-1]
    return Outcome(training, exit_code, last["mean_return"], last["env_steps"], last["wall_s"])


@contextlib.contextmanager
def simulators(training: Training, address_file: Path) -> Iterator[None]:
    """In a process of their own, which imports neither ray nor torch."""
    address = address_file.read_text() if address_file.exists() else "127.0.0.1:1"
    command = ["run", training.env, "--server", address, "--envs", str(training.envs), "--quiet"]
    command += ["--inference", training.inference]
    process = subprocess.Popen([sys.executable, "-m", "client_sdk.cli", *command])
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _history(directory: Path) -> list[dict[str, float]]:
    path = directory / "latest" / "policy_server_progress.json"
    return json.loads(path.read_text()) if path.exists() else []


def document(outcomes: Sequence[Outcome]) -> str:
    """The page."""
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        "# Results",
        "",
        (
            f"Written by `{COMMAND}` at commit `{report.commit()}` on {date}: {os.cpu_count()} cores, "
            f"{platform.system()}, Python {platform.python_version()}. "
            "Env steps and wall time are those until the goal: the mean return over at least 20 "
            "episodes. The clock runs from the first `train()`; simulators are one process."
        ),
        "",
        "| Training | Environment | Simulated | Goal | Mean return | Env steps | Wall time | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        training = outcome.training
        lines.append(
            f"| {training.name} | {training.env} | {training.envs} | {training.goal:g} "
            f"| {outcome.mean_return:.0f} | {outcome.env_steps:,} | {outcome.wall_s:.0f} s "
            f"| {'reached' if outcome.reached else 'missed'} |"
        )
    lines += ["", "The commands:", ""]
    for outcome in outcomes:
        training = outcome.training
        lines += [
            f"{training.name}, {training.env}:",
            "",
            "```console",
            f"$ policy-server {shlex.join(training.arguments())}",
            (
                f"$ policy-client run {training.env} --server localhost:9900 "
                f"--envs {training.envs} --inference {training.inference}"
            ),
            "```",
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    """Run them all, or those whose name holds a word; 1 if one missed its goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="trainings whose name holds this")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    # Whoever ends this ends the processes under it, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = []
    for training in TRAININGS:
        if options.only in f"{training.name}, {training.env}":
            outcomes.append(run(training))
            last = outcomes[-1]
            print(
                f"{training.name}, {training.env}: mean return {last.mean_return:.0f} of "
                f"{training.goal:g} after {last.env_steps:,} env steps, {last.wall_s:.0f} s",
                flush=True,
            )
    options.document.write_text(document(outcomes), encoding="utf-8")
    print(f"written to {options.document}")
    return 0 if outcomes and all(outcome.reached for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
