"""Decisions made where the tokens are, against those worked out on the host, and that nothing in them waits for the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hesper.graft.decision import Decision, grouped_mean
from hesper.graft.even import EvenDecision
from hesper.graft.restoration import Restoration, restored_mean

DOUBLE = torch.float64


@st.composite
def merges(draw: st.DrawFn, tokens: int | None = None, images: int | None = None) -> EvenDecision:
    """For every image some rows that leave, in any order, and where each goes."""
    images, tokens = images or draw(st.integers(1, 3)), tokens or draw(st.integers(2, 9))
    many = draw(st.integers(0, tokens - 1))
    gone: list[int] = []
    into: list[int] = []
    for image in range(images):
        order = [image * tokens + place for place in draw(st.permutations(range(tokens)))]
        gone += order[:many]
        into += [draw(st.sampled_from(order[many:])) for _ in range(many)]
    return EvenDecision(images, tokens, torch.tensor(gone, dtype=torch.int64), torch.tensor(into, dtype=torch.int64))


def on_host(decision: EvenDecision) -> Decision:
    """The same decision as rows in ascending order on the host."""
    order = decision.gone.numpy().argsort()
    into = None if decision.into is None else decision.into.numpy()[order]
    return Decision(decision.rows, decision.gone.numpy()[order], into, decision.left)


def rows_for(decision: EvenDecision) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    many = decision.rows
    return torch.randn(many, 5, generator=generator, dtype=DOUBLE), torch.randint(1, 5, (many,), generator=generator).to(DOUBLE)


@given(merges())
def test_it_says_what_a_decision_on_the_host_says(decision: EvenDecision) -> None:
    other = on_host(decision)
    assert decision.staying.tolist() == other.staying.tolist() and decision.fate.tolist() == other.fate.tolist()
    assert decision.nothing == other.nothing and decision.left == other.left
    homes = dict(zip(decision.gone.tolist(), decision.homes.tolist(), strict=True))
    assert [homes[row] for row in other.gone.tolist()] == other.to.tolist()


@given(merges())
def test_drops_say_what_a_decision_on_the_host_says(decision: EvenDecision) -> None:
    drops = EvenDecision(decision.images, decision.tokens, decision.gone, None)
    assert drops.staying.tolist() == on_host(drops).staying.tolist() and drops.fate.tolist() == on_host(drops).fate.tolist()


@given(st.data())
def test_one_after_the_other_is_both_at_once(data: st.DataObject) -> None:
    first = data.draw(merges())
    later = data.draw(merges(first.left[0], first.images))
    both, other = first.then(later), on_host(first).then(on_host(later))
    assert both.staying.tolist() == other.staying.tolist() and both.fate.tolist() == other.fate.tolist() and both.left == other.left


@given(merges())
def test_means_and_sizes_are_those_of_the_host(decision: EvenDecision) -> None:
    rows, size = rows_for(decision)
    for found, wanted in zip(grouped_mean(rows, size, decision), grouped_mean(rows, size, on_host(decision)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    restoration = Restoration(5, {"restoration.stretch": torch.tensor(0.8), "restoration.gain": torch.linspace(-0.1, 0.1, 5)}).double()
    for found, wanted in zip(
        restored_mean(rows, size, decision, restoration), restored_mean(rows, size, on_host(decision), restoration), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_host_where_several_go_to_one_row() -> None:
    decision = EvenDecision(2, 5, torch.tensor([4, 1, 2, 5, 7, 8]), torch.tensor([0, 0, 3, 6, 6, 6]))
    rows, size = rows_for(decision)
    weights = torch.randn(2 * 2, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    slopes = []
    for each in (decision, on_host(decision)):
        leaf, restoration = rows.clone().requires_grad_(), Restoration(5).double()
        (restored_mean(leaf, size, each, restoration)[0] * weights).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_halves_are_averaged_in_single_precision(dtype: torch.dtype) -> None:
    tokens = 300
    decision = EvenDecision(1, tokens, torch.arange(1, tokens), torch.zeros(tokens - 1, dtype=torch.int64))
    rows = torch.full((tokens, 4), 400.0, dtype=dtype)
    mean, size = restored_mean(rows, torch.ones(tokens), decision, Restoration(4))
    assert mean.dtype is dtype and mean.tolist() == [[400.0] * 4] and size.tolist() == [float(tokens)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_sum_in_halves(dtype: torch.dtype) -> None:
    decision = EvenDecision(1, 300, torch.arange(1, 300), torch.zeros(299, dtype=torch.int64))
    rows = 400 + torch.randn(300, 4, generator=torch.Generator().manual_seed(4))
    expected = restored_mean(rows, torch.ones(300), decision, Restoration(4))
    with torch.autocast("cpu", dtype):
        for found, wanted in zip(restored_mean(rows, torch.ones(300), decision, Restoration(4)), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, where it first needs forward derivatives
def test_of_several_that_go_to_one_place_none_is_left_to_chance() -> None:
    """Forward derivatives, too, flow through one writer."""
    decision = EvenDecision(1, 4, torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    rows, along = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    mean = lambda values: restored_mean(values, torch.ones(4, dtype=DOUBLE), decision, Restoration(5).double())[0]  # noqa: E731
    (_, slope) = torch.func.jvp(mean, (rows,), (along,))
    torch.testing.assert_close(slope, (mean(rows + 1e-6 * along) - mean(rows - 1e-6 * along)) / 2e-6, rtol=1e-5, atol=1e-7)


def test_host_numbers_are_not_needed_before_the_rows_are_there() -> None:
    """On tensors without values everything that waits for one fails."""
    with FakeTensorMode():
        first = EvenDecision(2, 9, torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
        both = first.then(EvenDecision(2, 6, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)))
        rows, size = restored_mean(torch.randn(18, 5), torch.ones(18), both, Restoration(5))
        assert rows.shape == (8, 5) and size.shape == (8,) and both.fate.shape == (18,)
    assert np.shape(both.left) == (2,)
