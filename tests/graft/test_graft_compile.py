"""``torch.compile`` on grafted models: the same logits, a handful of graphs however the batches differ, one sentence where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from families import family
from hesper.graft import GraftedViT, graft
from hesper.plan import HeadCut
from vits import cuts_of, pictures, plan_for, tables, vit

PIECES = 8  # forward, embed, project, its readers' part, merge_heads, feed, norm, readout
FORMS = 3  # each for the first shape, for any shape, and for batches of one


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def cut_model(model: Any, heads: Any = (), **how: Any) -> GraftedViT:
    return graft(model, plan_for(model, cuts_of("merge", [0, 1, 2], **how), heads=heads), tables(model))


def check_like_eager(cut: GraftedViT, backend: str, batches: tuple[int, ...]) -> list[int]:
    """The compiled model's logits are the model's own; how many graphs there were after each batch."""
    compiled, graphs = torch.compile(cut, backend=backend), []
    with torch.no_grad():
        for count in batches:
            images = pictures(count)
            torch.testing.assert_close(compiled(images), cut(images), rtol=1e-5, atol=1e-5)
            graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("how", [{"remove": 2}, {"threshold": 64.0}])
@pytest.mark.parametrize(("kind", "skip"), [("plain", True), ("pooled", False)])
def test_a_few_graphs_serve_every_batch(kind: str, skip: bool, how: dict[str, Any]) -> None:
    model = vit(kind, depth=10)
    cut = graft(model, plan_for(model, cuts_of("merge", [0, 1, 2], **how), skip_unread=skip), tables(model))
    graphs = check_like_eager(cut, "eager", (4, 3, 1, 2, 5, 6))
    assert graphs[0] >= 5 and graphs[-1] <= PIECES * FORMS
    assert graphs[-1] == graphs[3], "new counts of tokens must not make new graphs"


@pytest.mark.parametrize("kind", ["rotary", "hf_vit"])
def test_other_libraries_blocks_compile_as_well(kind: str) -> None:
    model: Any = family(kind).eval()
    size = (32, 32) if kind == "hf_vit" else (32, 24)
    cut = cut_model(model, threshold=64.0)
    images = pictures(3, size=size)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(cut, backend="eager")(images), cut(images), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 5


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks whether a tensor has one
def test_compiled_and_differentiated_as_one_is_eager_too() -> None:
    cut, images = cut_model(vit(), [HeadCut(1, (0,))], threshold=64.0), pictures(4).requires_grad_()
    (expected,) = torch.autograd.grad(cut(images).square().sum(), images)
    (found,) = torch.autograd.grad(torch.compile(cut, backend="aot_eager")(images).square().sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-3


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_machine_code_for_the_halves_gives_the_same_logits() -> None:
    model = vit(depth=2)
    cut = graft(model, plan_for(model, cuts_of("merge", [0], threshold=64.0)), tables(model))
    assert check_like_eager(cut, "inductor", (3, 4))[0] >= 5


@pytest.mark.parametrize("how", [{"remove": 2}, {"threshold": 64.0}])
def test_one_graph_is_refused_in_one_sentence(how: dict[str, Any]) -> None:
    cut = cut_model(vit(), **how)
    with pytest.raises(
        RuntimeError, match=r"decided image by image, so a grafted model does not compile as one graph; use hesper\.compiled"
    ):
        torch.compile(cut, backend="eager", fullgraph=True)(pictures(2))


@torch.no_grad()
def test_a_plan_that_cuts_nothing_is_one_graph() -> None:
    model, images = vit(), pictures(2)
    whole = graft(model, plan_for(model))
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
