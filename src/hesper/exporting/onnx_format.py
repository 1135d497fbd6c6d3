"""ONNX: one file for ONNX Runtime and TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesper.errors import JobError, UsageError
from hesper.exporting.formats import Runner
from hesper.exporting.notes import KEY, Notes
from hesper.exporting.quiet import innermost, quietly
from hesper.exporting.tensorrt import refused_by_tensorrt
from hesper.graft.one_graph import OneGraphViT

__all__ = ["ONNX", "bound"]

OPSETS = range(18, 24)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Onnx:
    """The format; ``opset`` is the one written where none is asked for."""

    name = "onnx"
    suffix = ".onnx"
    opset: int | None = 20
    any_batch = True

    def write(self, graph: OneGraphViT, example: Tensor, notes: Notes, opset: int | None, path: Path) -> dict[str, Any]:
        """Write the graph by torch's dynamo exporter; ``images`` in, ``logits`` out, weights inside."""
        _require("onnx", "onnxscript", "onnxruntime")
        wanted = opset or self.opset
        if wanted not in OPSETS:
            raise UsageError(f"Opset {wanted} is not one that is exported; use one from {OPSETS[0]} to {OPSETS[-1]}.")
        any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},) if notes.largest_batch is None else None
        with quietly():
            try:
                program = torch.onnx.export(
                    graph,
                    (example,),
                    dynamo=True,
                    dynamic_shapes=any_batch,
                    input_names=["images"],
                    output_names=["logits"],
                    opset_version=wanted,
                    verbose=False,
                )
            except Exception as error:
                raise JobError(f"The model cannot be written as ONNX with opset {wanted}: {innermost(error)}") from error
        assert program is not None
        model = program.model_proto
        model.producer_name = KEY
        model.metadata_props.add(key=KEY, value=notes.dumps())
        try:
            path.write_bytes(model.SerializeToString())
        except (ValueError, RuntimeError) as error:
            raise JobError(
                "An ONNX file of one piece holds at most 2 GB, and the model is larger; give --precision fp16, or export to torch."
            ) from error
        operators = Counter(node.op_type for node in model.graph.node)
        return {
            "opset": next(own.version for own in model.opset_import if not own.domain),
            "operators": dict(sorted(operators.items())),
            "tensorrt_refuses": refused_by_tensorrt(model),
        }

    def open(self, path: Path, device: str, provider: str | None, threads: int | None) -> Runner:
        """A session of ONNX Runtime."""
        _require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Its threads spin after a call for the next one, and would keep a core from the model whose turn it is.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = PROVIDERS[provider or device]
        have = onnxruntime.get_available_providers()
        if wanted not in have:
            raise UsageError(f"This ONNX Runtime has no {wanted}; it has {', '.join(have)}.")
        others = [PROVIDERS["cuda"]] if provider == "tensorrt" and PROVIDERS["cuda"] in have else []
        here = {"device_id": torch.cuda.current_device()} if device == "cuda" else {}
        chosen = [(name, {} if name == PROVIDERS["cpu"] else here) for name in dict.fromkeys([wanted, *others, PROVIDERS["cpu"]])]
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:
            raise UsageError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {innermost(error)}") from error
        notes = Notes.loads(session.get_modelmeta().custom_metadata_map.get(KEY), path)
        if session.get_providers()[0] != wanted:
            raise UsageError(f"ONNX Runtime did not start {wanted}; what that needs is not installed, so use --provider cpu.")
        runtime, there = f"ONNX Runtime {onnxruntime.__version__}, {wanted}", device != "cpu" and wanted != PROVIDERS["cpu"]
        return Runner(bound(session, notes.classes) if there else _copied(session), notes, runtime, on_host=not there)


def _copied(session: Any) -> Callable[[Tensor], Tensor]:
    """Runs a session on images of main memory."""
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

    return run


def bound(session: Any, classes: int) -> Callable[[Tensor], Tensor]:
    """Runs a session on images where they are, on a device or not, and leaves the logits ``[images, classes]`` there: nothing is copied."""
    (images_in,), (logits_out,) = session.get_inputs(), session.get_outputs()

    def run(images: Tensor) -> Tensor:
        images = images.to(torch.float32).contiguous()
        logits = images.new_empty(len(images), classes)
        if images.device.type == "cuda":
            torch.cuda.current_stream(images.device).synchronize()  # the session has a stream of its own, and waits for it at the end
        binding = session.io_binding()
        for bind, name, tensor in ((binding.bind_input, images_in.name, images), (binding.bind_output, logits_out.name, logits)):
            place = (tensor.device.type, tensor.device.index or 0)
            bind(name, *place, np.float32, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return logits

    return run


def _require(*packages: str) -> None:
    missing = [package for package in packages if util.find_spec(package) is None]
    if missing:
        raise UsageError(f"ONNX files need {' and '.join(missing)}; install hesper[onnx].")


ONNX = Onnx()
