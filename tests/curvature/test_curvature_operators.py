"""Products of Hessian and Gauss-Newton operators against dense matrices, finite differences and algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hesper.curvature import (
    CrossEntropy,
    DenseKL,
    GaussNewton,
    Hessian,
    ImageBatch,
    Lens,
    MatrixOperator,
    SymmetricOperator,
    axpy,
    dot,
    flatten,
    gradient,
    norm,
    random_normal,
    scale,
    unflatten,
    weight_lens,
)
from hesper.errors import JobError, UsageError
from oracles import dense_gauss_newton, dense_hessian, loss_value, value_slope, whole
from tiny_models import KINDS, tiny_batches, tiny_lens, tiny_model

MODES = ("reverse-over-reverse", "forward-over-reverse")
LOSSES = (CrossEntropy(), DenseKL(), DenseKL(4.0))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def is_matrix(operator: SymmetricOperator, matrix: Tensor, tolerance: float = 1e-10) -> bool:
    """Whether products with two random directions are those of the matrix, relative to its norm and theirs."""
    generator = torch.Generator().manual_seed(11)
    directions = [random_normal(operator.at, generator) for _ in range(2)]
    bound = tolerance * float(matrix.norm())
    return all(float((flatten(operator @ v) - matrix @ flatten(v)).norm()) <= bound * float(norm(v)) for v in directions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_hessian_equals_the_dense_one_in_both_modes(kind: str, loss: CrossEntropy | DenseKL) -> None:
    lens, batches = tiny_lens(kind, loss, 3), tiny_batches(2, 1)
    oracle = dense_hessian(lens, batches)
    assert float(oracle.norm()) > 1e-4
    for mode in MODES:
        assert is_matrix(Hessian(lens, batches, mode), oracle)
    assert is_matrix(Hessian(lens, batches, keep_graph=True), oracle)


def test_the_dense_form_has_the_order_of_flatten() -> None:
    lens, batches = tiny_lens("heads", CrossEntropy(), 3), tiny_batches(2, 1)
    for mode in MODES:
        assert close(Hessian(lens, batches, mode).dense(), dense_hessian(lens, batches))
    assert close(GaussNewton(lens, batches).dense(), dense_gauss_newton(lens, batches, 1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gauss_newton_equals_dense_factors(kind: str, loss: CrossEntropy | DenseKL) -> None:
    lens, batches = tiny_lens(kind, loss, 3), tiny_batches(1, 2)
    oracle = dense_gauss_newton(lens, batches, getattr(loss, "temperature", 1.0))
    assert is_matrix(GaussNewton(lens, batches), oracle)
    assert is_matrix(GaussNewton(lens, batches, keep_graph=True), oracle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_drift_from_the_dense_model_is_pure_gauss_newton(kind: str, temperature: float) -> None:
    lens, batches = tiny_lens(kind, DenseKL(temperature), 3), tiny_batches(2, 1)
    assert all(bool((part == 0).all()) for part in gradient(lens, batches).values())
    assert is_matrix(Hessian(lens, batches), dense_gauss_newton(lens, batches, temperature))
    direction = random_normal(lens.at, torch.Generator().manual_seed(2))
    assert close(flatten(Hessian(lens, batches) @ direction), flatten(GaussNewton(lens, batches) @ direction))


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_matches_finite_differences_along_a_unit_vector(kind: str) -> None:
    lens, batches = tiny_lens(kind, CrossEntropy(), 3), tiny_batches(2, 1)
    direction = random_normal(lens.at, torch.Generator().manual_seed(3))
    direction = scale(1 / norm(direction), direction)
    product = Hessian(lens, batches) @ direction
    assert float(dot(direction, product)) == pytest.approx(float(value_slope(lens, batches, direction, 3e-3)), rel=1e-6, abs=1e-8)
    step = 1e-4
    ahead, behind = (gradient(lens, batches, axpy(sign * step, direction, lens.at)) for sign in (1, -1))
    assert close(flatten(scale(1 / (2 * step), axpy(-1, behind, ahead))), flatten(product), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradient_away_from_the_point_equals_the_oracle(kind: str, loss: CrossEntropy | DenseKL) -> None:
    lens, batches = tiny_lens(kind, loss, 3), tiny_batches(2, 1)
    away = flatten(axpy(0.05, random_normal(lens.at, torch.Generator().manual_seed(4)), lens.at)).requires_grad_()
    value = loss_value(lens, away, whole(batches))
    (oracle,) = torch.autograd.grad(value, away)
    point = unflatten(away.detach(), lens.at)
    assert close(flatten(gradient(lens, batches, point)), oracle)
    assert lens.value(point, whole(batches)).item() == pytest.approx(value.item(), rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), factor=st.floats(-10, 10))
def test_products_are_symmetric_and_linear(seed: int, kind: str, factor: float) -> None:
    lens, batches, generator = tiny_lens(kind, CrossEntropy(), 3), tiny_batches(2, 1), torch.Generator().manual_seed(seed)
    a, b = (random_normal(lens.at, generator) for _ in range(2))
    for operator in (Hessian(lens, batches), GaussNewton(lens, batches)):
        times_a, times_b = operator @ a, operator @ b
        bound = 1e-11 * float(norm(a) * norm(b) + norm(times_a) * norm(times_b))
        assert abs(float(dot(a, times_b) - dot(b, times_a))) <= bound
        difference = axpy(-1, axpy(factor, times_a, times_b), operator @ axpy(factor, a, b))
        assert float(norm(difference)) <= 1e-11 * (1 + abs(factor)) * (1 + float(norm(times_a) + norm(times_b)))


def test_shared_weights_are_averaged_by_images_not_by_batches() -> None:
    lens = tiny_lens("weights", CrossEntropy(), 4)
    direction = random_normal(lens.at, torch.Generator().manual_seed(0))
    batches = tiny_batches(3, 1)
    for operator in (Hessian, GaussNewton):
        assert close(flatten(operator(lens, batches) @ direction), flatten(operator(lens, [whole(batches)]) @ direction), 1e-12)


def test_each_batch_sees_its_own_rows_of_a_point_that_differs_between_images() -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 3), tiny_batches(2, 1)
    lens = replace(lens, at={name: tensor + torch.arange(3.0).double()[:, None] for name, tensor in lens.at.items()})
    for mode in MODES:
        assert is_matrix(Hessian(lens, batches, mode), dense_hessian(lens, batches))
    assert is_matrix(GaussNewton(lens, batches), dense_gauss_newton(lens, batches, 1.0))


def test_images_of_a_sum_lens_do_not_meet() -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 3), tiny_batches(3)
    blocks = Hessian(lens, batches).dense().reshape(2, 3, 3, 2, 3, 3)  # block, image, token, twice
    for i in range(3):
        for j in range(3):
            assert bool((blocks[:, i, :, :, j] != 0).any()) == (i == j)


def test_variables_the_loss_does_not_read_have_zero_curvature() -> None:
    def logits(point: dict[str, Tensor], batch: ImageBatch) -> Tensor:
        return batch.images * point["used"]

    at = {"used": torch.ones(2, 3), "unused": torch.ones(2, 2)}
    lens, batches = Lens(at, logits, DenseKL(), "sum"), [ImageBatch(torch.eye(2, 3))]
    for operator in (Hessian(lens, batches), Hessian(lens, batches, "forward-over-reverse"), GaussNewton(lens, batches)):
        product = operator @ at
        assert float(product["unused"].abs().max()) == 0
        assert float(product["used"].abs().max()) > 0


def test_a_loss_linear_in_the_variables_has_zero_hessian() -> None:
    class Linear(CrossEntropy):
        def per_image(self, logits: Tensor, batch: ImageBatch, dense: Tensor | None = None) -> Tensor:
            return logits.sum(1)

    lens, batches = Lens({"z": torch.ones(2, 3)}, lambda x, _: 2 * x["z"], Linear(), "sum"), [ImageBatch(torch.zeros(2, 1))]
    for mode in MODES:
        assert float(norm(Hessian(lens, batches, mode) @ lens.at)) == 0


def test_products_work_where_gradients_are_off() -> None:
    lens, batches = tiny_lens("heads", CrossEntropy(), 2), tiny_batches(2)
    with torch.no_grad():
        inside = Hessian(lens, batches) @ lens.at
    assert torch.equal(flatten(inside), flatten(Hessian(lens, batches) @ lens.at))
    assert not flatten(inside).requires_grad


def test_chosen_weights_give_the_block_of_the_whole_hessian() -> None:
    model, batches = tiny_model(), tiny_batches(2)
    full, part = weight_lens(model, CrossEntropy()), weight_lens(model, CrossEntropy(), ["head.weight", "head.bias"])
    rows = flatten({name: torch.full_like(tensor, name in part.at) for name, tensor in full.at.items()}).bool()
    assert is_matrix(Hessian(part, batches), dense_hessian(full, batches)[rows][:, rows])


def test_an_unknown_weight_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"no parameter 'head.wieght'; did you mean 'head.weight'"):
        weight_lens(tiny_model(), CrossEntropy(), ["head.wieght"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_batch(mode: str, bad: float) -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 4), tiny_batches(2, 2)
    batches[1].images[1, 0, 0] = bad
    with pytest.raises(JobError, match="batch 1 is not finite for 1 of its 2 images, first for image 1"):
        Hessian(lens, batches, mode) @ lens.at
    with pytest.raises(JobError, match="batch 1"):
        GaussNewton(lens, batches) @ lens.at
    with pytest.raises(JobError, match="batch 1"):
        gradient(lens, batches)


def test_a_failed_batch_leaves_no_half_kept_graphs() -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 4), tiny_batches(2, 2)
    batches[1].images[0, 0, 0] = float("nan")
    operator = Hessian(lens, batches, keep_graph=True)
    for _ in range(2):
        with pytest.raises(JobError, match="batch 1"):
            operator @ lens.at


def test_wrong_vectors_modes_and_sizes_are_refused() -> None:
    lens, batches = tiny_lens("tokens", CrossEntropy(), 2), tiny_batches(2)
    with pytest.raises(UsageError, match="missing"):
        Hessian(lens, batches) @ {"tokens0": torch.ones(2, 3)}
    with pytest.raises(UsageError, match="shape"):
        Hessian(lens, batches) @ {"tokens0": torch.ones(2, 3), "tokens1": torch.ones(2, 4)}
    with pytest.raises(UsageError, match="no mode"):
        Hessian(lens, batches, "sideways")
    with pytest.raises(UsageError, match="graph to keep"):
        Hessian(lens, batches, "forward-over-reverse", keep_graph=True)
    with pytest.raises(UsageError, match="small cases"):
        MatrixOperator(torch.zeros(1, 1).expand(5000, 5000)).dense()


def test_a_mean_lens_over_convolutions_and_batch_norm_in_eval_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = [ImageBatch(images[:2], torch.tensor([0, 1])), ImageBatch(images[2:], torch.tensor([2]))]
    lens = weight_lens(model, CrossEntropy())
    oracle = dense_hessian(lens, batches)
    for mode in MODES:
        assert is_matrix(Hessian(lens, batches, mode), oracle)
