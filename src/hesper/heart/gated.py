"""The dense model with gates and shifts on everything that could be cut: the function whose derivatives are the sensitivities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hesper.hosts.base import Host, HostBlock

TOKEN_GATES = "token_gates"
HEAD_GATES = "head_gates"
TOKEN_SHIFTS = "token_shifts"
HEAD_SHIFTS = "head_shifts"


@dataclass(frozen=True, eq=False)
class Trace:
    """A gated forward: logits ``[images, classes]`` and what each block computed.

    Per block, ``streams`` holds the stream after attention ``[images, tokens, width]`` and ``head_outputs`` the heads before the
    projection ``[images, heads, tokens, head_dim]``.
    """

    logits: Tensor
    streams: tuple[Tensor, ...]
    head_outputs: tuple[Tensor, ...]


def gated_forward(host: Host, images: Tensor, gates: Mapping[str, Tensor] | None = None) -> Trace:
    """Run the dense model with gates.

    ``gates`` may hold

    * ``token_gates`` ``[images, depth, patches]``: entry ``[n, l, i]`` multiplies patch i's weight in the softmax of every
      block after l (log g is added to its column of the logits) and in the mean a pooling classifier takes. One changes
      nothing; zero is the exact deletion of the token after the attention of block l.
    * ``head_gates`` ``[images, depth, heads]``: multiplies a head's output before the projection; zero is exact removal.
    * ``token_shifts`` ``[images, depth, tokens, width]``: added to the stream after the attention of each block.
    * ``head_shifts`` ``[images, depth, heads, tokens, head_dim]``: added to the outputs of each block's heads.

    Example:
        >>> import timm, torch
        >>> from hesper.hosts import TimmViT
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> x = torch.randn(2, 3, 160, 160)
        >>> torch.equal(gated_forward(TimmViT(model), x).logits, model(x))
        True
    """
    gates = gates or {}
    anatomy = host.anatomy
    stream = host.embed(images)
    leave = _cumulative(gates.get(TOKEN_GATES), anatomy.prefix_tokens)
    streams, heads = [], []
    for index, block in enumerate(host.blocks):
        bias = None if leave is None or index == 0 else leave[:, index - 1, None, None]
        mixed = _attend(block, stream, bias)
        if HEAD_SHIFTS in gates:
            mixed = mixed + gates[HEAD_SHIFTS][:, index]
        heads.append(mixed)
        if HEAD_GATES in gates:
            mixed = mixed * gates[HEAD_GATES][:, index, :, None, None]
        stream = stream + block.merge_heads(mixed.transpose(1, 2).flatten(2))
        if TOKEN_SHIFTS in gates:
            stream = stream + gates[TOKEN_SHIFTS][:, index]
        streams.append(stream)
        stream = stream + block.feed(stream)
    return Trace(_readout(host, stream, leave), tuple(streams), tuple(heads))


def _attend(block: HostBlock, stream: Tensor, bias: Tensor | None) -> Tensor:
    projected = block.project(stream)
    query, key, value = (t.transpose(1, 2) for t in (projected.query, projected.key, projected.value))
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=block.scale)


def _cumulative(token_gates: Tensor | None, prefix: int) -> Tensor | None:
    """Log weight of every token after each block, ``[images, depth, tokens]``; prefix tokens have none."""
    if token_gates is None:
        return None
    return pad(token_gates.log().cumsum(1), (prefix, 0))


def _readout(host: Host, stream: Tensor, leave: Tensor | None) -> Tensor:
    prefix = host.anatomy.prefix_tokens
    normed = host.norm(stream)
    if not host.anatomy.reads_patches:
        return host.readout(normed[:, :prefix], None)
    weight = None if leave is None else leave[:, -1, prefix:].exp()
    return host.readout(normed[:, :prefix], normed[:, prefix:], weight)


def ones(host: Host, images: int, *names: str, like: Tensor) -> dict[str, Tensor]:
    """The point at which nothing is cut: gates at one, shifts at zero, for ``images`` images."""
    a = host.anatomy
    shapes = {
        TOKEN_GATES: (images, a.depth, a.tokens - a.prefix_tokens),
        HEAD_GATES: (images, a.depth, a.heads),
        TOKEN_SHIFTS: (images, a.depth, a.tokens, a.width),
        HEAD_SHIFTS: (images, a.depth, a.heads, a.tokens, a.head_dim),
    }
    return {name: like.new_full(shapes[name], 1.0 if name in (TOKEN_GATES, HEAD_GATES) else 0.0) for name in names}
