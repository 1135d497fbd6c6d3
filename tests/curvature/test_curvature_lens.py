"""Lenses, batches and points: sums, means, rows, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesper.curvature import CrossEntropy, DenseKL, Hessian, ImageBatch, Lens, axpy, dot, flatten, gradient, norm, scale, size, unflatten
from hesper.curvature import random_normal as normal
from hesper.curvature import random_signs as signs
from hesper.errors import UsageError
from tiny_models import tiny_batches, tiny_lens


def test_value_is_the_sum_or_the_mean_of_the_images() -> None:
    (batch,) = tiny_batches(3)
    gates, weights = tiny_lens("tokens", CrossEntropy(), 3), tiny_lens("weights", CrossEntropy(), 3)
    assert gates.value(gates.at, batch).item() == pytest.approx(3 * weights.value(weights.at, batch).item(), rel=1e-12)
    assert torch.allclose(gates.per_image(gates.at, batch), weights.per_image(weights.at, batch))


def test_restricting_a_lens_takes_the_rows_of_its_images() -> None:
    lens, (first, second) = tiny_lens("heads", DenseKL(), 3), tiny_batches(2, 1)
    away = scale(0.5, lens.at)
    both = ImageBatch(torch.cat([first.images, second.images]))
    cuts = ((slice(0, 2), first), (slice(2, 3), second))
    parts = [lens.restrict(rows).value({k: t[rows] for k, t in away.items()}, batch).item() for rows, batch in cuts]
    assert sum(parts) == pytest.approx(lens.value(away, both).item(), rel=1e-12)
    weights = tiny_lens("weights", DenseKL(), 3)
    assert weights.restrict(slice(0, 1)) is weights


def test_one_shot_iterators_and_empty_batches_are_refused() -> None:
    lens = tiny_lens("weights", CrossEntropy(), 2)
    with pytest.raises(UsageError, match="not an iterator"):
        gradient(lens, iter(tiny_batches(2)))
    with pytest.raises(UsageError, match="there are no batches"):
        gradient(lens, [])
    with pytest.raises(UsageError, match="batch 1 has no images"):
        gradient(lens, tiny_batches(1, 0))


@pytest.mark.parametrize("counts", [(2,), (2, 2)])
def test_a_sum_lens_wants_exactly_its_images(counts: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="entries for 3 images, the batches hold"):
        gradient(tiny_lens("tokens", CrossEntropy(), 3), tiny_batches(*counts))


def test_a_sum_lens_wants_images_first_in_every_tensor() -> None:
    lens = Lens({"a": torch.ones(2, 3), "b": torch.ones(3)}, lambda x, _: x["a"], DenseKL(), "sum")
    with pytest.raises(UsageError, match="first dimension counts the images"):
        gradient(lens, tiny_batches(2))
    with pytest.raises(UsageError, match="no variables"):
        gradient(Lens({}, lambda x, _: x["a"], DenseKL(), "sum"), tiny_batches(2))


def test_logits_of_another_shape_are_refused() -> None:
    lens = Lens({"a": torch.ones(2, 3)}, lambda x, _: x["a"].sum(), DenseKL(), "sum")
    with pytest.raises(UsageError, match=r"must give \[images, classes\] for 2 images"):
        Hessian(lens, tiny_batches(2)) @ lens.at


shapes = st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4)


@given(shapes=shapes, seed=st.integers(0, 2**32))
def test_flatten_and_unflatten_are_inverse_and_keep_products(shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    like = {str(k): torch.zeros(shape, dtype=torch.float64) for k, shape in enumerate(shapes)}
    a, b = normal(like, generator), signs(like, generator)
    assert flatten(a).numel() == size(like)
    assert all(torch.equal(unflatten(flatten(a), like)[name], a[name]) for name in like)
    assert float(dot(a, b)) == pytest.approx(float(flatten(a) @ flatten(b)), abs=1e-12)
    assert float(norm(b)) == pytest.approx(size(like) ** 0.5)
    assert torch.equal(flatten(axpy(2.0, a, b)), 2 * flatten(a) + flatten(b))


def test_a_flat_vector_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit a point of 2 numbers"):
        unflatten(torch.zeros(3), {"a": torch.zeros(2)})


def test_the_generator_alone_decides_the_probes() -> None:
    like = {"a": torch.zeros(50, dtype=torch.float64)}
    for draw in (signs, normal):
        first, second = (draw(like, torch.Generator().manual_seed(5))["a"] for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, draw(like, torch.Generator().manual_seed(6))["a"])
