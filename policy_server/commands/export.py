"""``policy-server export``: the policy of a checkpoint as one ONNX file, compared with RLlib's own.

Main thread only; starts neither a server nor Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from policy_server.commands.check import describe
from policy_server.commands.restored import restore
from policy_server.onnx_engine.factory import build_onnx_factory
from policy_server.onnx_engine.operators import NotExportableError
from policy_server.onnx_engine.parity import ROWS, Parity, measure

if TYPE_CHECKING:
    from policy_server.learner_view import LearnerView


class ExportError(RuntimeError):
    """The policy has no file; the message is one line that says why. Nothing was written."""


def export(checkpoint: Path, file: Path) -> dict[str, str]:
    """Write the policy of a checkpoint to a file, complete or not at all.

    Args:
        checkpoint: An Algorithm's, or a directory of them with a ``latest``.
        file: Replaced if it exists.

    Returns:
        What was written and how it compares with RLlib's module, by name, in the order to show it.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ExportError: The policy cannot be exported, differs from RLlib's, or cannot be written.
    """
    restored = restore(checkpoint)
    spaces = (restored.observation_space, restored.action_space)
    pipelines = (restored.env_to_module, restored.module_to_env)
    try:
        factory = build_onnx_factory(restored.config, restored.module, *spaces, *pipelines)
        # No learner looks at what this policy sees.
        policy = factory.build(restored.version, restored.env_steps, cast("LearnerView", None))
        parity = measure(policy.onnx, restored.module, *pipelines, *spaces)
    except NotExportableError as error:
        raise ExportError(f"{checkpoint} cannot be exported: {error}") from error
    module = type(restored.module).__name__
    compared = _described(parity)
    if not parity.passes:
        said = ", ".join(f"{name} {value}" for name, value in compared.items())
        raise ExportError(f"the graph differs from {module}: {said}; nothing was written")
    try:
        _write(file, policy.model)
    except OSError as error:
        raise ExportError(f"cannot write {file}: {os.strerror(error.errno or 0)}") from error
    spec = policy.onnx.spec
    return {
        "file": f"{file}, {len(policy.model) / 1e3:.1f} kB",
        "sha256": hashlib.sha256(policy.model).hexdigest(),
        "policy": f"{spec.policy_id} of {spec.algorithm}, version {spec.version}",
        "observations": describe(restored.observation_space),
        "actions": f"{describe(restored.action_space)}, {spec.distribution}",
        "compared": f"with {module} on {ROWS:,} random observations",
        **compared,
    }


def _described(parity: Parity) -> dict[str, str]:
    found = {
        parity.inputs_role: (
            f"differ by {parity.inputs_difference:.1e} of their magnitude, RLlib's own by "
            f"{parity.rounding:.1e} from double precision"
        ),
        "greedy actions": f"{parity.greedy_equal:.1%} are equal",
    }
    if parity.logp_difference is not None:
        found["action_logp"] = f"differs by {parity.logp_difference:.1e}"
    return found


def _write(file: Path, model: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(model)
        temporary.replace(file)
    except BaseException:  # a full disk, or Ctrl-C
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
