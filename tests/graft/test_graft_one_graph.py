"""The one graph against the packed model: the same decisions, the same logits, for every host and criterion."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from families import FAMILIES, family, shots
from hesper.errors import UsageError
from hesper.graft import GraftedViT, graft
from hesper.graft.one_graph import OneGraphViT, compiled, separated
from hesper.hosts import open_host
from hesper.plan import HeadCut, HeadGate, TokenCut
from vits import KINDS, READERS, REMOVABLE, cuts_of, gate_tables, learned_tables, pictures, plan_for, tables, vit

DECIDERS = [("kl", "merge"), ("tome", "merge"), ("kl", "drop"), ("cls", "drop"), ("cls", "merge"), ("kl", "merge refined")]


def cut_of(model: Any, criterion: str, combine: Any, learned: bool = False, skip: bool = False, heads: Any = (), **how: Any) -> GraftedViT:
    own = {**tables(model), **(learned_tables(model) if learned else {})}
    return graft(model, plan_for(model, cuts_of(combine, [0, 1], **how), criterion, heads, skip), own)


def check(cut: GraftedViT, images: torch.Tensor, adaptive: bool) -> set[int]:
    """Both on the same images; the counts of tokens that images kept."""
    graph = OneGraphViT(cut)
    assert graph.fixed is not adaptive
    with torch.no_grad():
        found = torch.cat([graph(image[None]) for image in images]) if adaptive else graph(images)
        outcome = cut.run(images)
    torch.testing.assert_close(found, outcome.logits, rtol=1e-9, atol=1e-9)
    return set(outcome.traffic.fed[:, 1].tolist())


@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_counts_give_the_same_logits(kind: str, criterion: str, combine: str) -> None:
    double = torch.float64
    model, (how, *refined) = vit(kind, double), combine.split()
    cut = cut_of(model, criterion, how, bool(refined), remove=4)
    assert len(check(cut, pictures(4, double), adaptive=False)) == 1


@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
@pytest.mark.parametrize("multiple", [1, 3])
def test_adaptive_counts_give_the_same_logits_image_by_image(criterion: str, combine: str, multiple: int) -> None:
    double = torch.float64
    model, (how, *refined), images = vit("plain", double), combine.split(), pictures(6, double)

    def at(price: float) -> GraftedViT:
        return cut_of(model, criterion, how, bool(refined), threshold=price, multiple=multiple)

    # The price at which images lose most different counts.
    best = max((2.0**power for power in range(-7, 10)), key=lambda price: len(set(at(price).run(images).traffic.fed[:, 1].tolist())))
    assert len(check(at(best), images, adaptive=True)) > 1


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "distilled"])
def test_other_families_give_the_same_logits(kind: str) -> None:
    double = torch.float64
    model = family(kind, double)
    for how in ({"remove": 3}, {"threshold": 3.0}):
        cut = cut_of(model, "kl", "merge", True, **how)
        check(cut, shots(kind, 3, double), adaptive="threshold" in how)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind in REMOVABLE])
def test_removed_heads_and_an_unread_last_block_give_the_same_logits(kind: str) -> None:
    double = torch.float64
    model = vit(kind, double)
    heads = (HeadCut(0, (1,)), HeadCut(2, (0,)))
    check(cut_of(model, "kl", "merge", True, skip=True, heads=heads, remove=4), pictures(3, double), adaptive=False)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *FAMILIES])
def test_a_layer_each_for_queries_keys_and_values_gives_the_same_logits(kind: str, skip: bool) -> None:
    double = torch.float64
    model, images = (vit(kind, double), pictures(3, double)) if kind in KINDS else (family(kind, double), shots(kind, 3, double))
    cut = cut_of(model, "kl", "merge", True, skip=skip and not open_host(model).anatomy.reads_patches, remove=3)
    with torch.no_grad():
        expected = cut(images)
        torch.testing.assert_close(OneGraphViT(separated(cut))(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
def test_keys_have_a_bias_only_where_they_are_read(criterion: str, combine: str) -> None:
    double, (how, *_) = torch.float64, combine.split()
    cut, images = cut_of(vit("plain", double), criterion, how, remove=3), pictures(3, double)
    reads = {int(block) for block, decider in cut.deciders.items() if decider.reads_keys}  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = cut(images)
        torch.testing.assert_close(OneGraphViT(separated(cut))(images), expected, rtol=1e-9, atol=1e-9)
    layers = [block.attention for block in cut.host.blocks]
    assert {index for index, attn in enumerate(layers) if attn.k_proj.bias is not None} == reads
    assert all(attn.v_proj.bias is None and attn.q_proj.bias is not None for attn in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_cuts_nothing_is_the_host(kind: str) -> None:
    double = torch.float64
    model, images = vit(kind, double), pictures(2, double)
    with torch.no_grad():
        torch.testing.assert_close(OneGraphViT(graft(model, plan_for(model)))(images), model(images), rtol=1e-9, atol=1e-9)


def test_halves_decide_in_single_precision() -> None:
    model = vit("plain")
    cut = cut_of(model, "kl", "merge", remove=4)
    halved = OneGraphViT(graft(model, cut.plan, tables(model)))
    halved.cut.network.half()
    images = pictures(3)
    found = halved(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cut(images), rtol=0.05, atol=0.1)


def test_what_no_graph_can_decide_is_refused_with_the_alternative() -> None:
    model = vit("plain")
    gated = graft(model, plan_for(model, gates=[HeadGate(1, 0.1)]), {**tables(model), **gate_tables(model)})
    with pytest.raises(UsageError, match="--heads static"):
        OneGraphViT(gated)
    control = graft(model, plan_for(model, [TokenCut(1, "drop", remove=2)], "random"), tables(model))
    with pytest.raises(UsageError, match="'random' is a control"):
        OneGraphViT(control)
    adaptive = OneGraphViT(cut_of(model, "kl", "merge", threshold=1.0))
    with pytest.raises(UsageError, match="one by one"):
        adaptive(pictures(2))


@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("combine", ["drop", "merge"])
@pytest.mark.parametrize("kind", ["plain", "pooled", "pooled_with_class"])
def test_where_everything_would_go_the_dearest_stays(kind: str, combine: str, multiple: int) -> None:
    double = torch.float64
    cut = cut_of(vit(kind, double), "cls", combine, threshold=1e9, multiple=multiple)
    check(cut, pictures(3, double), adaptive=True)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("remove", [0, 1])
def test_cuts_of_nothing_of_one_and_of_the_last_block(remove: int, skip: bool) -> None:
    double = torch.float64
    model = vit("plain", double)
    for cuts in (cuts_of("merge", [0, 3], remove=remove), cuts_of("merge", [1, 3], threshold=3.0, multiple=2)):
        cut = graft(model, plan_for(model, cuts, "kl", [HeadCut(1, (2,))], skip), {**tables(model), **learned_tables(model)})
        check(cut, pictures(3, double), adaptive=cuts[0].remove is None)


def test_only_removed_heads() -> None:
    model = vit("plain", torch.float64)
    check(graft(model, plan_for(model, heads=[HeadCut(1, (0, 2))])), pictures(2, torch.float64), adaptive=False)


WHOLE = [("plain", "kl", "merge refined"), ("pooled", "kl", "merge"), ("plain", "tome", "merge"), ("plain", "cls", "merge")]


@pytest.mark.parametrize(("kind", "criterion", "combine"), WHOLE)
def test_a_compiler_takes_fixed_counts_as_one_graph_of_any_number_of_images(kind: str, criterion: str, combine: str) -> None:
    torch.compiler.reset()
    model, (how, *refined) = vit(kind, torch.float64), combine.split()
    cut = cut_of(model, criterion, how, bool(refined), remove=4)
    whole = torch.compile(OneGraphViT(cut, fused=True), backend="eager", fullgraph=True)
    with torch.no_grad():
        for many in (3, 1):
            torch.testing.assert_close(whole(pictures(many, torch.float64)), cut(pictures(many, torch.float64)), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", [{"remove": 4}, {"threshold": 0.05}])
def test_a_compiled_model_is_the_model(how: dict[str, Any]) -> None:
    torch.compiler.reset()
    cut = cut_of(vit("plain"), "kl", "merge", learned=True, **how)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(cut)(pictures(3)), cut(pictures(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_counts_wait_for_nothing(kind: str, learned: bool) -> None:
    """On tensors without values whatever asks for one fails, in the packed model too."""
    cut = cut_of(vit(kind), "kl", "merge", learned=learned, remove=4)
    adaptive = cut_of(vit(kind), "kl", "merge", threshold=0.05)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert cut(torch.randn(pictures(3).shape)).shape == (3, cut.plan.model.anatomy.classes)
        with pytest.raises(Exception, match=r"(?i)data.?dependent|numpy"):
            adaptive(torch.randn(pictures(3).shape))


@pytest.mark.parametrize(("criterion", "combine"), DECIDERS)
@pytest.mark.parametrize("kind", ["plain", "pooled", "registers"])
@torch.no_grad()
def test_a_network_in_halves_lets_tokens_go_in_single_precision(kind: str, criterion: str, combine: str) -> None:
    """The same go, and are as many, as in a network of single precision whose weights and images were rounded likewise."""
    (how, *refined), many = combine.split(), pictures(3).half()
    rounded, halves = (cut_of(vit(kind).half().float(), criterion, how, bool(refined), remove=4) for _ in range(2))
    halves.network.half()
    expected = rounded(many.float())
    for found in (halves(many), OneGraphViT(halves)(many)):
        assert found.dtype is torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_a_graph_holds_nothing_that_lies_on_the_host() -> None:
    """Every head a power of its own, some heads gone: no constant among the graph's tensors but what the model holds."""
    cut = cut_of(vit("plain"), "kl", "merge", learned=True, heads=[HeadCut(1, (0,))], remove=4)
    model = OneGraphViT(cut, fused=True)
    graph = torch.export.export(model, (pictures(2),))
    assert set(graph.constants) <= {name for name, _ in model.named_buffers()}
    assert not [node for node in graph.graph.nodes if "lift_fresh" in str(node.target)]


def test_powers_that_learn_get_their_gradient() -> None:
    cut, images = cut_of(vit("plain"), "kl", "merge", remove=4), pictures(2)
    slopes = []
    for model in (cut, OneGraphViT(cut)):
        power = torch.ones_like(cut.size_exponent).requires_grad_()
        cut.size_exponent = power
        slopes.append(torch.autograd.grad(model(images).square().sum(), power)[0])
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


def test_places_are_counted_exactly_under_autocast() -> None:
    """Halves have no numbers of their own for places above 256: two tokens would stand at one."""
    cut = cut_of(vit("plain", img_size=(160, 160)), "kl", "merge", remove=60)
    graph = OneGraphViT(cut)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = graph.begin(torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
        for block in range(3):
            tokens = graph.through(block, tokens)
    assert tokens.size is not None and tokens.size.shape[1] < 401
    assert tokens.size.sum(1).tolist() == [401, 401]


def test_shared_keys_are_read_by_whichever_block_reads_them() -> None:
    """The first of two blocks of one attention reads no keys, the second does."""
    double = torch.float64
    model = vit("plain", double)
    model.blocks[1].attn = model.blocks[0].attn
    cut, images = graft(model, plan_for(model, cuts_of("merge", [1], remove=4), "tome"), tables(model)), pictures(3, double)
    with torch.no_grad():
        expected = cut(images)
        torch.testing.assert_close(OneGraphViT(separated(cut))(images), expected, rtol=1e-9, atol=1e-9)
    assert cut.host.blocks[0].attention.k_proj.bias is not None and cut.host.blocks[2].attention.k_proj.bias is None


def test_weights_beyond_all_numbers_are_cut_short() -> None:
    cut, prices = cut_of(vit("plain"), "kl", "merge", remove=4), list[torch.Tensor]()
    for decider in cut.deciders.values():
        decider.gamma = 100.0  # type: ignore[assignment]  # e to the 600 is no number
        decider.graph_prices.register_forward_hook(lambda module, given, found: prices.append(found[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        OneGraphViT(cut)(pictures(3))
    assert len(prices) >= 2 and all(price.isfinite().all() for price in prices)
