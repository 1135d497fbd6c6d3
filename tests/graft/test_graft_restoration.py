"""What merged tokens get back, against the formula token by token, and sizes to a power against repeated tokens."""

import numpy as np
import pytest
import torch

from hesper.graft.decision import Decision, grouped_mean
from hesper.graft.restoration import MOST_STRETCHED, Restoration, restored_mean

DECISION = Decision(7, np.array([1, 3, 5]), np.array([2, 2, 6]), (4,))
GROUPS = [[0], [1, 2, 3], [4], [5, 6]]
SIZE = torch.tensor([1.0, 2, 1, 3, 1, 1, 2], dtype=torch.float64)


def rows(seed: int = 3) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(stretch: float, seed: int = 0) -> Restoration:
    draw = torch.Generator().manual_seed(seed)
    gain = torch.randn(5, generator=draw) * 0.1
    return Restoration(5, {"restoration.stretch": torch.tensor(stretch), "restoration.gain": gain}).double()


def test_merged_tokens_have_the_mean_length_and_the_direction_of_the_mean() -> None:
    x = rows()
    mean, total = grouped_mean(x, SIZE, DECISION)
    out, size = restored_mean(x, SIZE, DECISION, Restoration(5).double())
    assert torch.equal(size, total)
    for place, group in enumerate(GROUPS):
        length = (x[group].norm(dim=1) * SIZE[group]).sum() / SIZE[group].sum()
        assert out[place].norm().item() == pytest.approx(length.item(), rel=1e-12)
        torch.testing.assert_close(torch.nn.functional.normalize(out[place], dim=0), torch.nn.functional.normalize(mean[place], dim=0))


@pytest.mark.parametrize("stretch", [0.0, 0.5, 1.3])
def test_a_learned_restoration_follows_its_formula_and_leaves_alone_what_did_not_merge(stretch: float) -> None:
    x, restoration = rows(4), learned(stretch)
    out, _ = restored_mean(x, SIZE, DECISION, restoration)
    for place, group in enumerate(GROUPS):
        share = SIZE[group] / SIZE[group].sum()
        mean, length = (x[group] * share[:, None]).sum(0), (x[group].norm(dim=1) * share).sum()
        ratio = min(float(length / mean.norm()), MOST_STRETCHED)
        expected = (1 + restoration.gain) * mean * ratio ** float(restoration.stretch)
        torch.testing.assert_close(out[place], x[group[0]] if len(group) == 1 else expected, rtol=1e-12, atol=1e-12)


def test_without_a_restoration_merged_tokens_are_their_mean() -> None:
    torch.testing.assert_close(restored_mean(rows(), SIZE, DECISION, None)[0], grouped_mean(rows(), SIZE, DECISION)[0], rtol=0, atol=0)


@pytest.mark.parametrize("length", [1e-30, 1.0, 100.0, 1e15])
def test_opposite_tokens_merge_to_nothing_rather_than_to_infinity(length: float) -> None:
    x, one = torch.tensor([[1.0, -2.0], [-1.0, 2.0]]) * length, torch.ones(2)
    decision = Decision(2, np.array([1]), np.array([0]), (1,))
    assert restored_mean(x, one, decision, Restoration(2))[0].tolist() == [[0.0, 0.0]]


def test_long_tokens_merge_in_half_precision() -> None:
    rows = torch.full((200, 4), 400.0, dtype=torch.float16)
    decision = Decision(200, np.arange(1, 200), np.zeros(199, dtype=int), (1,))
    out, size = restored_mean(rows, torch.ones(200, dtype=torch.float16), decision, Restoration(4).half())
    assert size.tolist() == [200.0] and torch.allclose(out.float(), rows[:1].float(), rtol=2e-2)


def test_sums_over_large_groups_keep_their_digits_in_half_precision() -> None:
    exact = 1 + 0.05 * torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    decision = Decision(400, np.arange(1, 400), np.zeros(399, dtype=int), (1,))
    plain = {"restoration.stretch": torch.tensor(0.0)}
    out, _ = restored_mean(exact.bfloat16(), torch.ones(400, dtype=torch.bfloat16), decision, Restoration(16, plain).bfloat16())
    torch.testing.assert_close(out[0].float(), exact.mean(0), rtol=2e-2, atol=0)


def test_nearly_opposite_tokens_are_stretched_by_a_factor_of_four_at_most() -> None:
    x, one = torch.tensor([[1.0, 0.001], [-1.0, 0.001]]), torch.ones(2)
    out, _ = restored_mean(x, one, Decision(2, np.array([1]), np.array([0]), (1,)), Restoration(2))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.004]]))


def test_gradients_reach_what_is_learned() -> None:
    def out(stretch: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        tables = {"restoration.stretch": stretch, "restoration.gain": gain}
        return restored_mean(rows(), SIZE, DECISION, Restoration(5, tables))[0]

    start = [tensor.detach().requires_grad_() for tensor in learned(1.2).state_dict().values()]
    assert torch.autograd.gradcheck(out, tuple(start))
