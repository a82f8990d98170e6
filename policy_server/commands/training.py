"""``policy-server train``: build the algorithm, learn until a goal, leave a checkpoint behind.

Main thread only. Everything that Ray starts ends here, whichever way the training ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy_server.commands.checkpoints import CheckpointDirectory
from policy_server.commands.progress import (
    Display,
    Progress,
    ReturnWindow,
    open_display,
    progress_of,
)
from policy_server.commands.ray_life import CLUSTER, import_ray, running_ray
from policy_server.commands.ray_noise import Noise, quiet_start
from policy_server.commands.training_config import (
    OptionError,
    TrainOptions,
    build_config,
    server_config,
    server_config_of,
)
from policy_server.commands.training_errors import (
    Overheard,
    PortInUseError,
    TrainingError,
    explained,
    one_line,
    told,
)
from policy_server.config import PolicyServerConfig

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from policy_server.commands.ending import Ending

_HISTORY = "policy_server_progress.json"
"""Beside RLlib's files in each checkpoint, so that a resumed curve continues."""
_STOP_TIMEOUT_S = 3.0
"""For runners to drain; whoever takes longer is killed."""

logger = logging.getLogger(__name__)


def train(options: TrainOptions, ending: Ending) -> int:
    """Train until a goal or a signal.

    Args:
        options: What was asked for.
        ending: The context that turns signals into KeyboardInterrupt.

    Returns:
        The exit code: 0 where the goal was reached, 128 + the signal's number after a signal.

    Raises:
        OptionError: An option does not fit the algorithm.
        PortInUseError: Something else listens there.
        TrainingError: RLlib refused the configuration, the learner failed, or the last checkpoint
            cannot be written.
    """
    # Before paying for Ray's imports and start; the server checks again when it binds.
    if options.config is None:
        check_port(server_config(options))
    import_ray()
    config = build_config(options)
    if options.config is not None:
        check_port(server_config_of(config))
    run = _Run(options, config)
    with open_display(options.title, options.stop_return, quiet=options.quiet) as display:
        try:
            with running_ray(config, ending, logging.DEBUG if _debugging() else logging.ERROR):
                run.start(display)
                run.learn(display)
        except KeyboardInterrupt:
            display.say(f"stopped by {signal.Signals(ending.signal or signal.SIGINT).name}")
        finally:
            run.report(display)
    return ending.exit_code


def check_port(server: PolicyServerConfig) -> None:
    """Raise PortInUseError where the server could not listen, as far as this machine can tell."""
    if os.environ.get(CLUSTER):  # the runner may live on another machine
        return
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does: connections of an earlier run that linger are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host.strip("[]"), server.port))
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {server.host}:{server.port}: {os.strerror(error.errno or 0)}. "
                "Choose another --port, or 0 for a free one"
            ) from error


class _Run:
    """One training from build to goal."""

    def __init__(self, options: TrainOptions, config: AlgorithmConfig) -> None:
        self._options = options
        self._config = config
        self._history: list[Progress] = []
        self._checkpoints: CheckpointDirectory | None = None
        self._checkpoint: Path | None = None
        self._algo: Algorithm | None = None
        if options.checkpoint_dir is not None:
            try:
                self._checkpoints = CheckpointDirectory(
                    options.checkpoint_dir, options.keep_checkpoints, fresh=not options.resume
                )
            except FileExistsError as error:
                raise OptionError(
                    f"argument --checkpoint-dir: {error}: --resume goes on with it, another "
                    "directory starts a new one"
                ) from error
            except OSError as error:
                raise OptionError(f"argument --checkpoint-dir: {error}") from error

    def start(self, display: Display) -> None:
        """Build the algorithm, restore it if asked to, and say where simulators connect."""
        latest = None
        if self._options.resume and self._checkpoints is not None:
            latest = self._checkpoints.latest()
        if latest is not None:
            _await_checkpoint(self._config)
        _leave_a_core_to_the_server()
        quiet = contextlib.nullcontext(Noise()) if _debugging() else quiet_start()
        with Overheard() as overheard, quiet as noise:
            try:
                self._algo = algo = self._config.build_algo()
            except Exception as error:
                # The tracebacks of three processes say no more than this line.
                noise.wanted = not overheard.text
                raise explained(error, overheard.text) from error
        if latest is not None:
            self._restore(algo, latest)
        for address, engine in _servers(algo):
            display.say(f"policy server listening on {address}")
            display.say(f"acting by {engine}")
        if self._options.resume:
            display.say(f"resumed from {latest}" if latest else "nothing to resume: starting new")

    def learn(self, display: Display) -> None:
        """Train, show, and write checkpoints until a goal is reached."""
        algo = self._algo
        if algo is None:
            raise TrainingError("learn() comes after start()")
        try:
            self._learn(algo, display)
        finally:
            _stop(algo)

    def _learn(self, algo: Algorithm, display: Display) -> None:
        before = self._history[-1] if self._history else None
        wall_s = before.wall_s if before else 0.0
        returns = ReturnWindow()
        while True:
            began = time.monotonic()
            try:
                result = algo.train()
            except Exception as error:
                logger.debug("train() failed", exc_info=error)
                iteration = before.iteration + 1 if before else 1
                raise TrainingError(
                    f"iteration {iteration} failed: {told(error)} (--debug shows more)"
                ) from error
            wall_s += time.monotonic() - began
            before = progress_of(result, before, wall_s, returns)
            self._history.append(before)
            display.show(before)
            if self._reached(before):
                self._write_checkpoint(algo, before.iteration, display, last=True)
                return
            if before.iteration % self._options.checkpoint_every == 0:
                self._write_checkpoint(algo, before.iteration, display, last=False)

    def report(self, display: Display) -> None:
        """Say what was reached and where it is; draw the picture."""
        if not self._history:
            return
        display.conclude(self._history[-1])
        if self._checkpoint is not None:
            display.say(f"checkpoint: {self._checkpoint}")
        picture = self._options.picture
        if picture is None:
            return
        from policy_server.commands.learning_curve import draw_learning_curve

        try:
            draw_learning_curve(
                picture, self._history, self._options.title, self._options.stop_return
            )
            display.say(f"learning curve: {picture}")
        except OSError as error:
            logger.warning("cannot write %s: %s", picture, error)

    def _reached(self, progress: Progress) -> bool:
        options = self._options
        return (
            (options.stop_return is not None and progress.mean_return >= options.stop_return)
            or (options.stop_iters is not None and progress.iteration >= options.stop_iters)
            or (options.stop_steps is not None and progress.env_steps >= options.stop_steps)
        )

    def _write_checkpoint(
        self, algo: Algorithm, iteration: int, display: Display, *, last: bool
    ) -> None:
        if self._checkpoints is None:
            return

        def save(directory: Path) -> None:
            algo.save_to_path(directory.absolute())
            history = [dataclasses.asdict(progress) for progress in self._history]
            (directory / _HISTORY).write_text(json.dumps(history), encoding="utf-8")

        try:
            self._checkpoint = self._checkpoints.write(iteration, save)
        except Exception as error:  # a full disk must not cost the training
            message = f"checkpoint {iteration} not written: {one_line(error)}"
            if last:
                raise TrainingError(message) from error
            display.say(f"{message}; training goes on, the checkpoint before it is intact")

    def _restore(self, algo: Algorithm, latest: Path) -> None:
        from policy_server.lasting_stats import forget_restored

        try:
            algo.restore_from_path(latest.absolute())
            history = json.loads((latest / _HISTORY).read_text(encoding="utf-8"))
        except Exception as error:
            raise TrainingError(f"cannot resume from {latest}: {one_line(error)}") from error
        forget_restored(algo.metrics)
        self._history = [Progress(**values) for values in history]
        self._checkpoint = latest
        # The restored state may be dropped on its way to a busy runner: weights go once more.
        algo.env_runner_group.sync_weights(
            from_worker_or_learner_group=algo.learner_group, inference_only=True
        )
        algo.env_runner_group.foreach_env_runner("checkpoint_restored")


def _await_checkpoint(config: AlgorithmConfig) -> None:
    """Let simulators, which may be waiting already, act by the checkpoint's weights only."""
    server = dataclasses.replace(server_config_of(config), awaits_checkpoint=True)
    config.environment(env_config={**config.env_config, **server.to_env_config()})


def _leave_a_core_to_the_server() -> None:
    """Let the learner's threads not fight for the core that actions are chosen on.

    On two cores a learner with two threads waits more for them than it computes with them.
    """
    if "OMP_NUM_THREADS" in os.environ:  # somebody has decided
        return
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def _servers(algo: Algorithm) -> list[tuple[str, str]]:
    """Where simulators connect, and what chooses their actions there."""
    found = algo.env_runner_group.foreach_env_runner(
        _served_by, local_env_runner=algo.config.num_env_runners == 0, timeout_seconds=30
    )
    return [(address, engine) for address, engine in found if address]


def _served_by(runner: Any) -> tuple[str, str]:
    return str(getattr(runner, "address", "") or ""), str(getattr(runner, "engine", ""))


def _stop(algo: Algorithm) -> None:
    """Runners drain, their clients are told; whoever is slow is killed by Ray's shutdown."""
    try:
        algo.env_runner_group.foreach_env_runner(
            "stop",
            healthy_only=False,
            local_env_runner=algo.config.num_env_runners == 0,
            timeout_seconds=_STOP_TIMEOUT_S,
        )
    except Exception as error:
        logger.warning("the env runners did not stop in order: %s", one_line(error))
