"""A trained model in the shape of a wider one: the same function, at the cost of the wider shape.

    python benchmarks/widen.py FILE --times 4 --out WIDE_FILE

Every channel and every head stands there ``--times`` times, and every map divides by that what it sums: norms see the same mean and
variance, heads the same queries and keys, and the logits stay as they are. A trained model of width 192 with 3 heads (ViT-Tiny) so fills
the shape of one of width 768 with 12 heads (ViT-B), where no weights of that size are at hand: what it decides is what a trained model
decides, and what it takes is what ViT-B takes. Reads and writes timm's names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def widened(weights: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The tensors of a model ``times`` as wide that gives the same logits.

    Example:
        >>> wide = widened({"blocks.0.mlp.fc1.weight": torch.tensor([[2.0]]), "head.weight": torch.tensor([[6.0]])}, 2)
        >>> wide["blocks.0.mlp.fc1.weight"].tolist(), wide["head.weight"].tolist()
        ([[1.0, 1.0], [1.0, 1.0]], [[3.0, 3.0]])
    """
    return {name: _widened(name, tensor, times).contiguous() for name, tensor in weights.items()}


def _widened(name: str, tensor: Tensor, times: int) -> Tensor:
    if name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        return tensor.repeat(1, 1, times)
    if name == "patch_embed.proj.weight":
        return tensor.repeat(times, 1, 1, 1)
    if ".q_norm." in name or ".k_norm." in name:
        return tensor  # of the width of a head, which stays
    if name.startswith("head"):
        return tensor.repeat(1, times) / times if tensor.ndim == 2 else tensor
    kinds = 3 if ".qkv." in name else 1  # queries, keys and values lie one after the other, and each is as wide as the model
    parts = [part.repeat(times, times) / times if part.ndim == 2 else part.repeat(times) for part in tensor.chunk(kinds)]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    save_file(widened(load_file(asked.weights), asked.times), asked.out)


if __name__ == "__main__":
    main()
