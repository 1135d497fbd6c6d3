"""ONNX Runtime: a graph written for it, a session that runs one, and tensors given to it where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hesper.errors import JobError, UsageError
from hesper.exporting.quiet import innermost, quietly

__all__ = ["Session", "bound", "drawn", "need", "open_session", "packed", "runtime_of"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@dataclass(frozen=True, eq=False)
class Session:
    """A session of ONNX Runtime and its words for itself; ``there`` says whether it takes tensors on a device."""

    own: Any
    runtime: str
    there: bool


def need(*packages: str) -> None:
    """UsageError where one of these is not installed."""
    missing = [package for package in packages if util.find_spec(package) is None]
    if missing:
        raise UsageError(f"ONNX files need {' and '.join(missing)}; install hesper[onnx].")


def drawn(graph: nn.Module, example: tuple[Tensor, ...], opset: int, names: Sequence[str], shapes: Any) -> Any:
    """The ONNX model of a graph, drawn by torch's dynamo exporter; ``names`` are its inputs', ``shapes`` which of their sizes may differ.

    Raises:
        JobError: it cannot be drawn.
    """
    with quietly():
        try:
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(names),
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            raise JobError(f"The model cannot be written as ONNX with opset {opset}: {innermost(error)}") from error
    assert program is not None
    return program.model_proto


def packed(model: Any) -> bytes:
    """An ONNX model as it lies in a file; JobError where it is too large for one."""
    try:
        return cast(bytes, model.SerializeToString())
    except (ValueError, RuntimeError) as error:
        raise JobError(
            "An ONNX file of one piece holds at most 2 GB, and the model is larger; give --precision fp16, or export to torch."
        ) from error


def open_session(model: Path | bytes, device: str, provider: str | None, threads: int | None) -> Session:
    """A session on a file, or on what would be in one.

    Raises:
        UsageError: ONNX Runtime cannot open it, or lacks the provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its threads spin after a call for the next one, and would keep a core from the model whose turn it is.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = PROVIDERS[provider or device]
    runtime, have = runtime_of(device, provider), onnxruntime.get_available_providers()
    others = [PROVIDERS["cuda"]] if provider == "tensorrt" and PROVIDERS["cuda"] in have else []
    here = {"device_id": torch.cuda.current_device()} if device == "cuda" else {}
    chosen = [(name, {} if name == PROVIDERS["cpu"] else here) for name in dict.fromkeys([wanted, *others, PROVIDERS["cpu"]])]
    try:
        session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=chosen)
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else model
        raise UsageError(f"ONNX Runtime {onnxruntime.__version__} cannot open {what}: {innermost(error)}") from error
    if session.get_providers()[0] != wanted:
        raise UsageError(f"ONNX Runtime did not start {wanted}; what that needs is not installed; install it, or run on the processor.")
    return Session(session, runtime, device != "cpu" and wanted != PROVIDERS["cpu"])


def runtime_of(device: str, provider: str | None = None) -> str:
    """ONNX Runtime's version and provider in words; UsageError where it lacks the provider."""
    import onnxruntime

    wanted, have = PROVIDERS[provider or device], onnxruntime.get_available_providers()
    if wanted not in have:
        raise UsageError(f"This ONNX Runtime has no {wanted}; it has {', '.join(have)}.")
    return f"ONNX Runtime {onnxruntime.__version__}, {wanted}"


def bound(session: Any, shape: tuple[int, ...] | None = None) -> Callable[..., Tensor | None]:
    """Runs a session on tensors where they are, on a device or not: nothing is copied.

    What it gives stays there too: as a tensor ``[batch, *shape]``, or where no ``shape`` is known nowhere that anyone looks.
    """
    inputs, (out,) = [each.name for each in session.get_inputs()], session.get_outputs()

    def run(*tensors: Tensor) -> Tensor | None:
        tensors = tuple(tensor.to(torch.float32).contiguous() for tensor in tensors)
        first = tensors[0]
        result = None if shape is None else first.new_empty(len(first), *shape)
        if first.device.type == "cuda":
            torch.cuda.current_stream(first.device).synchronize()  # the session has a stream of its own, and waits for it at the end
        binding = session.io_binding()
        for name, tensor in zip(inputs, tensors, strict=True):
            binding.bind_input(name, *_place(tensor), np.float32, tuple(tensor.shape), tensor.data_ptr())
        if result is None:
            binding.bind_output(out.name, *_place(first))
        else:
            binding.bind_output(out.name, *_place(result), np.float32, tuple(result.shape), result.data_ptr())
        session.run_with_iobinding(binding)
        return result

    return run


def _place(tensor: Tensor) -> tuple[str, int]:
    return tensor.device.type, tensor.device.index or 0
