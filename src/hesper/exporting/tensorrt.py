"""What of an ONNX graph TensorRT takes."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

__all__ = ["operators", "refused_by_tensorrt"]


@cache
def operators() -> frozenset[str]:
    """Operators that TensorRT takes by its list (onnx-tensorrt, docs/operators.md, TensorRT 10.15, opsets 9 to 24), without scatters.

    These have been silently wrong there (TensorRT issues 3750 and 4425).

    >>> "MatMul" in operators(), "ScatterElements" in operators()
    (True, False)
    """
    return frozenset(resources.files(__package__).joinpath("tensorrt_operators.txt").read_text(encoding="utf-8").split())


def refused_by_tensorrt(model: Any) -> list[str]:
    """What in an ONNX model TensorRT may not take: operators not on its list, and a TopK whose K is not constant.

    The latter is ruled out by its list up to 8.4; that of 10.15 says nothing of it.
    """
    constant = {own.name for own in model.graph.initializer} | {
        name for node in model.graph.node if node.op_type == "Constant" for name in node.output
    }
    refused = {node.op_type for node in model.graph.node if node.op_type not in operators() or node.domain}
    if any(node.op_type == "TopK" and node.input[1] not in constant for node in model.graph.node):
        refused.add("TopK whose K is not constant")
    return sorted(refused)
