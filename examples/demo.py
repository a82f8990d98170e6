"""Train CartPole from simulators in processes of their own, and watch it: ``make demo``.

One process trains (ray, torch) and serves the policy; two run environments with ``client_sdk`` and
nothing else. All of them end with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# The hyperparameters of RLlib's own tuned CartPole example, for batches of 4,000 steps.
SETTINGS = {
    "lr": "0.0003",
    "train_batch_size_per_learner": "4000",
    "minibatch_size": "128",
    "num_epochs": "6",
    "vf_loss_coeff": "0.01",
    "model_config": '{"fcnet_hiddens": [64, 64], "vf_share_layers": true}',
}
SIMULATORS = 2
ENVS_EACH = 4
READY_TIMEOUT_S = 120.0
END_TIMEOUT_S = 6.0


def main() -> int:
    """Run the demo and return the exit code of the training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--stop-return", type=float, default=450.0, help="default: 450")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    options = parser.parse_args()

    run = options.runs / time.strftime("demo-%Y%m%d-%H%M%S")
    run.mkdir(parents=True)
    address_file = run / "address"
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    train = [
        *command("policy-server"), "train", "--env", "CartPole-v1", "--algo", "PPO",
        "--port", "0", "--address-file", str(address_file),
        "--stop-return", str(options.stop_return), "--seed", str(options.seed),
        "--checkpoint-dir", str(run), *settings,
    ]  # fmt: skip
    simulate = [
        *command("policy-client"), "run", "CartPole-v1", "--envs", str(ENVS_EACH), "--server",
    ]  # fmt: skip

    # As a terminal's Ctrl-C: both end everything in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as processes:
        trainer = processes.enter_context(running(train))
        try:
            address = wait_for(address_file, trainer)
            if address is None:
                return trainer.wait()
            with (run / "simulators.log").open("w") as log:
                for _ in range(SIMULATORS):
                    processes.enter_context(running([*simulate, address], log))
                return trainer.wait()
        except KeyboardInterrupt:
            return 130


def command(name: str) -> list[str]:
    """The installed command beside this interpreter."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed here: pip install '.[server]'")
    return [found]


@contextlib.contextmanager
def running(arguments: Sequence[str], log: object = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the context: asked first, by its id, then killed."""
    # A session of its own, so that a terminal's Ctrl-C reaches us alone and the order is ours.
    process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(address_file: Path, trainer: subprocess.Popen[bytes]) -> str | None:
    """The address that the server wrote there; None if the training ended before."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if address_file.exists():
            return address_file.read_text()
        try:
            trainer.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        return None
    raise SystemExit(f"the policy server did not start within {READY_TIMEOUT_S:g} s")


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    sys.exit(main())
