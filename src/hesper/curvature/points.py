"""Vectors as named tensors: the one format in which points, gradients, directions and probes travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hesper.curvature.randomness import Randomness
from hesper.errors import UsageError

Point = Mapping[str, Tensor]


def size(point: Point) -> int:
    """Number of numbers in a point.

    >>> size({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    10
    """
    return sum(tensor.numel() for tensor in point.values())


def require_same_structure(point: Point, like: Point, what: str = "vector") -> None:
    """Raise UsageError unless ``point`` has the names and shapes of ``like``.

    >>> require_same_structure({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    """
    if point.keys() != like.keys():
        missing, extra = sorted(like.keys() - point.keys()), sorted(point.keys() - like.keys())
        raise UsageError(f"the {what} has other names than the point: missing {missing}, unexpected {extra}")
    for name, tensor in like.items():
        if point[name].shape != tensor.shape:
            raise UsageError(f"the {what} has shape {tuple(point[name].shape)} at {name!r}, the point has {tuple(tensor.shape)}")


def dot(a: Point, b: Point) -> Tensor:
    """Inner product ``sum_k a_k b_k`` over all entries, a scalar tensor.

    >>> dot({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])}).item()
    11.0
    """
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(a: Point) -> Tensor:
    """Euclidean length ``sqrt(a . a)`` over all entries, a scalar tensor.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}).item()
    5.0
    """
    return dot(a, a).sqrt()


def scale(factor: float | Tensor, a: Point) -> dict[str, Tensor]:
    """The point ``factor * a``.

    >>> scale(2.0, {"a": torch.tensor([3.0])})["a"].item()
    6.0
    """
    return {name: factor * tensor for name, tensor in a.items()}


def axpy(factor: float | Tensor, x: Point, y: Point) -> dict[str, Tensor]:
    """The point ``factor * x + y``.

    >>> axpy(2.0, {"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])})["a"].item()
    7.0
    """
    return {name: factor * x[name] + tensor for name, tensor in y.items()}


def flatten(point: Point) -> Tensor:
    """All entries in one vector: tensors in the order of the mapping, each in row-major order.

    >>> flatten({"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)}).tolist()
    [1.0, 2.0, 3.0]
    """
    return torch.cat([tensor.reshape(-1) for tensor in point.values()])


def unflatten(flat: Tensor, like: Point) -> dict[str, Tensor]:
    """Inverse of `flatten`, with the names, shapes and number types of ``like``; raises UsageError on a wrong length.

    >>> unflatten(torch.tensor([1.0, 2.0, 3.0]), {"a": torch.zeros(2), "b": torch.zeros(1)})["b"].tolist()
    [3.0]
    """
    if flat.shape != (size(like),):
        raise UsageError(f"a flat vector of shape {tuple(flat.shape)} does not fit a point of {size(like)} numbers")
    parts = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {name: part.reshape(tensor.shape).to(tensor.dtype) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def unit_vectors(like: Point) -> Iterator[dict[str, Tensor]]:
    """Yield the ``d`` unit vectors of the space of ``like``, in the order of `flatten`.

    >>> [flatten(e).tolist() for e in unit_vectors({"a": torch.zeros(2)})]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    flat = torch.zeros_like(flatten(like))
    for index in range(flat.numel()):
        unit = flat.clone()
        unit[index] = 1
        yield unflatten(unit, like)


# Both draw on the generator's own device, so that one seed gives the same probes to every device.
def random_signs(like: Point, generator: Randomness) -> dict[str, Tensor]:
    """Independent entries, +1 or -1 with equal probability: the probes of least variance for a trace.

    With a generator per image, the first dimension of every tensor counts the images.
    Source: Hutchinson, Communications in Statistics 19(2), 1990.

    >>> signs = random_signs({"a": torch.zeros(8)}, torch.Generator().manual_seed(0))["a"]
    >>> signs.abs().tolist() == [1.0] * 8
    True
    """
    if isinstance(generator, torch.Generator):
        return {name: _signs(tensor.shape, generator).to(tensor) for name, tensor in like.items()}
    return {name: torch.stack([_signs(tensor.shape[1:], each) for each in generator]).to(tensor) for name, tensor in like.items()}


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(0, 2, shape, generator=generator, device=generator.device) - 1


def random_normal(like: Point, generator: torch.Generator) -> dict[str, Tensor]:
    """Independent standard normal entries.

    >>> random_normal({"a": torch.zeros(2, 3)}, torch.Generator().manual_seed(0))["a"].shape
    torch.Size([2, 3])
    """
    return {
        name: torch.randn(tensor.shape, generator=generator, device=generator.device, dtype=torch.float64).to(tensor)
        for name, tensor in like.items()
    }
