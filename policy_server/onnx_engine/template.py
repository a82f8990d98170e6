"""Export a module's graph once, then make a complete ONNX file of each version by patching bytes.

A *template* is the exported graph plus where in its bytes every value lies that a version refreshes:
trained tensors, exploration's epsilon, filter statistics. Immutable; built and used by the actor
thread.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from client_sdk.policy_spec import PolicySpec
from policy_server.onnx_engine.graphs import PolicyGraph
from policy_server.onnx_engine.operators import (
    IR_VERSION,
    OPSET,
    PORTABLE_OPERATORS,
    NotExportableError,
)
from policy_server.onnx_engine.plan import GraphPlan

_MARKING_ATTEMPTS: Final = 4


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one refreshed value lies in a template."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """All refreshed values are float32."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Template:
    """One exported graph, to be filled in."""

    model: bytes
    """The serialized graph without metadata."""
    slots: Mapping[str, Slot]
    """By the name of the graph's parameter or buffer."""
    spec: PolicySpec
    """Of version 0."""

    def fill(self, values: Mapping[str, NDArray[np.float32]], version: int) -> bytes:
        """The complete ONNX file of one version.

        Args:
            values: Every slot's value.
            version: For the metadata.

        Raises:
            ValueError: A value is missing or has another shape or dtype than its slot.
        """
        model = bytearray(self.model)
        for name, slot in self.slots.items():
            value = values[name]
            if value.shape != slot.shape or value.dtype != np.float32:
                raise ValueError(
                    f"{name}: expected float32 {list(slot.shape)}, "
                    f"got {value.dtype} {list(value.shape)}"
                )
            model[slot.offset : slot.offset + slot.size_bytes] = np.ascontiguousarray(
                value, "<f4"
            ).tobytes()
        return bytes(model + _metadata(dataclasses.replace(self.spec, version=version)))


def refreshed_values(graph: PolicyGraph) -> dict[str, NDArray[np.float32]]:
    """Everything that a version refreshes, as it is in the graph now; views of its memory.

    Raises:
        NotExportableError: Something in it is no float32.
    """
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise NotExportableError(f"{name} is {tensor.dtype}")
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def export_template(plan: GraphPlan, spec: PolicySpec) -> Template:
    """Export a plan's graph.

    Args:
        plan: Its graph's parameters and buffers must differ from each other, bit by bit: the
            exporter merges equal ones into one. So randomize a copy.
        spec: What the file says of itself.

    Raises:
        NotExportableError: The exporter, or what came out of it, did not do.
    """
    rng = np.random.default_rng(0)
    values = refreshed_values(plan.graph)
    model = _export(plan)
    initializers = {each.name: each for each in model.graph.initializer}
    for name, value in values.items():
        initializer = initializers.get(name)
        if initializer is None:
            raise NotExportableError(f"{name} is no initializer of the exported graph")
        if (
            tuple(initializer.dims) != value.shape
            or initializer.data_type != onnx.TensorProto.FLOAT
        ):
            raise NotExportableError(f"{name} changed its shape or dtype in the export")
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"} or node.op_type not in PORTABLE_OPERATORS:
            operator = ".".join(filter(None, (node.domain, node.op_type)))
            raise NotExportableError(f"the graph holds {operator}, which game engines cannot run")
    slots: dict[str, Slot] = {}
    # A marker of four bytes may occur by chance in some megabytes of others: draw again.
    for _ in range(_MARKING_ATTEMPTS):
        for name, value in values.items():
            initializers[name].ClearField("float_data")
            initializers[name].raw_data = rng.bytes(value.nbytes)
        serialized = model.SerializeToString()
        for name, value in values.items():
            offset = _only_match(serialized, initializers[name].raw_data)
            if offset is not None:
                slots[name] = Slot(offset, value.shape)
        if len(slots) == len(values):
            return Template(serialized, slots, spec)
    missing = sorted(set(values) - set(slots))
    raise NotExportableError(f"{missing[0]} has no place of its own in the exported graph")


def _export(plan: GraphPlan) -> Any:
    inputs = [*(each.name for each in plan.inputs), plan.noise.input]
    outputs = plan.output_shapes()
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter is marked as legacy. The other one renames and folds trained tensors.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plan.graph,
                plan.example(rows=2),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=list(outputs),
                dynamic_axes={name: {0: "batch"} for name in [*inputs, *outputs]},
                do_constant_folding=True,
            )
    except Exception as error:  # whatever an exporter raises, there is no graph
        raise NotExportableError(f"the export failed: {_one_line(error)}") from error
    model = onnx.load_from_string(file.getvalue())
    model.ir_version = IR_VERSION
    for value in model.graph.output:
        # The exporter leaves some dimensions open that are not.
        shape = value.type.tensor_type.shape
        for dim, size in zip(shape.dim[1:], outputs[value.name], strict=True):
            dim.dim_value = size
    for node in model.graph.node:
        node.ClearField("doc_string")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise NotExportableError(f"the exported graph is not valid: {_one_line(error)}") from error
    return model


def _only_match(serialized: bytes, marker: bytes) -> int | None:
    first = serialized.find(marker)
    if first < 0 or serialized.find(marker, first + 1) >= 0:
        return None
    return first


def _metadata(spec: PolicySpec) -> bytes:
    model = onnx.ModelProto()
    for key, value in spec.to_metadata().items():
        model.metadata_props.add(key=key, value=value)
    # Serialized messages put one after the other are one message: no need to parse the graph.
    serialized: bytes = model.SerializeToString()
    return serialized


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
