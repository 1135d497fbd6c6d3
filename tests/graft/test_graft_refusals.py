from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from by_hand import grafted
from hesper.errors import UsageError
from hesper.graft import graft
from hesper.hosts.weights import weights_sha256
from hesper.plan import HeadCut, TokenCut
from vits import cuts_of, plan_for, tables, vit

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cuts": [TokenCut(0, "drop", remove=1)], "criterion": "tome"}, "'tome' merges and cannot drop"),
    ({"cuts": [TokenCut(0, "drop", remove=1)], "criterion": "clss"}, "'clss' is unknown; did you mean 'cls'"),
    ({"cuts": [TokenCut(0, "merge", remove=4), TokenCut(1, "merge", remove=5)]}, "block 1 removes 5 of 8 patches, but merging alternate"),
    ({"kind": "pooled", "skip_unread": True}, "without skip_unread"),
    ({"kind": "attention_norm", "heads": [HeadCut(0, (1,))]}, "normalised over all heads"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        grafted(**{"kind": "plain", **options})


def test_tables_and_images_that_do_not_fit_are_refused() -> None:
    model = vit()
    plan = plan_for(model, cuts_of("merge", [1], threshold=1.0))
    with pytest.raises(UsageError, match=r"table '1\.root' is missing"):
        graft(model, plan)
    with pytest.raises(UsageError, match=r"'1\.root' has shape \(24, 4\), but the plan needs \(24, 5\)"):
        graft(model, plan, {**tables(model), "1.root": torch.zeros(24, 4)})
    with pytest.raises(UsageError, match="another shape"):
        graft(vit(depth=3), plan, tables(model))
    cut = graft(model, plan, tables(model))
    sizes = [(1, 3, 32, 32), (3, 32, 24), (0, 3, 32, 24), (1, 1, 32, 24)]
    for wrong in (*map(torch.zeros, sizes), torch.zeros(1, 3, 32, 24, dtype=torch.uint8)):
        with pytest.raises(UsageError, match="images of 3 channels and 32 x 24 pixels"):
            cut(wrong)


def test_a_plan_for_other_weights_is_refused() -> None:
    model = vit()
    plan = plan_for(model, cuts_of("merge", [1], threshold=1.0))
    named = dataclasses.replace(plan, model=dataclasses.replace(plan.model, weights_sha256=weights_sha256(model.state_dict())))
    other = vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.bias[0] += 1e-3
    assert graft(model, named, tables(model)).plan == graft(other, named, tables(model), check_weights=False).plan
    with pytest.raises(UsageError, match="made for other weights of tiny"):
        graft(other, named, tables(model))
    assert graft(other.half(), named, tables(model)).plan == named  # what half a precision was rounded from cannot be told
