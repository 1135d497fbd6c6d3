"""A vision transformer of a few dozen numbers, and every kind of lens over it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hesper.curvature import Batch, ImageBatch, Lens, Loss, weight_lens

TOKENS, WIDTH, HEADS, CLASSES, BLOCKS = 3, 4, 2, 3, 2
KINDS = ("weights", "tokens", "heads", "activations")


class TinyAttention(nn.Module):
    """Two residual attention blocks on [images, tokens, width], read from the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(BLOCKS))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, gates: Mapping[str, Tensor] | None = None) -> Tensor:
        gates = gates or {}
        for block in range(BLOCKS):
            x = x + gates.get(f"activations{block}", torch.zeros_like(x))
            q, k, v = self.qkv[block](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            token_gate = gates.get(f"tokens{block}", x.new_ones(x.shape[:2]))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=token_gate.log()[:, None, None, :])
            head_gate = gates.get(f"heads{block}", x.new_ones(x.shape[0], HEADS))
            mixed = (mixed * head_gate[:, :, None, None]).transpose(1, 2).flatten(2)
            x = x + torch.tanh(self.proj[block](mixed))
        return self.head(x[:, 0])


def tiny_model(seed: int = 0) -> TinyAttention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyAttention().double().eval().requires_grad_(False)


def tiny_batches(*counts: int, seed: int = 1) -> list[ImageBatch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ImageBatch(
            torch.randn(count, TOKENS, WIDTH, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (count,), generator=generator),
        )
        for count in counts
    ]


def tiny_lens(kind: str, loss: Loss, images: int, seed: int = 0) -> Lens:
    model = tiny_model(seed)
    if kind == "weights":
        return weight_lens(model, loss)
    shape = {"tokens": (images, TOKENS), "heads": (images, HEADS), "activations": (images, TOKENS, WIDTH)}[kind]
    fill = 0.0 if kind == "activations" else 1.0
    at = {f"{kind}{block}": torch.full(shape, fill, dtype=torch.float64) for block in range(BLOCKS)}

    def logits(point: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return functional_call(model, {}, (batch.images, point))

    return Lens(at, logits, loss, "sum")
