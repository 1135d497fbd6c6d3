"""A plan on one screen of 80 columns and 40 lines, as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from hesper.plan.toml import plan_hash
from hesper.plan.vocabulary import Budget, Estimate, HeadCut, HeadGate, OperatingPoint, Plan, TokenCut

__all__ = ["render"]

_COLUMNS, _LINES = 80, 40
_LABEL = 10
_BAR = 20
_STATEMENT_LINES, _WHY_LINES, _MADE_LINES = 3, 2, 2


def render(plan: Plan, declined: Mapping[str, str] | None = None) -> str:
    """The plan for people: what was asked, what was measured, and a line per block; at most 40 lines of 80 columns.

    ``declined`` says why there is no "refit" or "refine", where that is known.
    """
    head = [*_title(plan), "", *_asked(plan, declined or {}), *_measured(plan), ""]
    table = _table(plan, _LINES - len(head) - 2)
    return "\n".join(_clip(_printable(line), _COLUMNS).rstrip() for line in [*head, *table]) + "\n"


def _title(plan: Plan) -> list[str]:
    anatomy, made = plan.model.anatomy, plan.provenance
    shape = f"{anatomy.depth} blocks, {anatomy.heads} heads, width {anatomy.width}, {anatomy.tokens} tokens"
    return [
        f"Plan {plan_hash(plan)[:12]} for {plan.model.name} ({plan.model.library})",
        *_labelled("model", shape),
        *_labelled("made", f"{made.created}, hesper {made.hesper}, torch {made.torch}, timm {made.timm}, seed {made.seed}", _MADE_LINES),
        *_labelled("data", f"{made.data_sha256[:12]}: {made.fit_images} images to fit, {made.verify_images} to verify"),
    ]


def _asked(plan: Plan, declined: Mapping[str, str]) -> list[str]:
    lines = _labelled("asked", f"{_budget(plan.budget)}, {plan.schedule} schedule", _MADE_LINES)
    if plan.pricing is not None:
        pricing = plan.pricing
        rounds = "1 round" if pricing.rounds == 1 else f"{pricing.rounds} rounds"
        how = f"T = {pricing.temperature:g}, {pricing.draws} draws, rank {pricing.rank}, gamma {pricing.gamma:g}, {rounds}"
        lines += _labelled("priced", f"criterion {pricing.criterion}, {how}")
        refined = f"what merged tokens get back and weigh, learned in {pricing.refine} epochs"
        for label, name, text in (
            ("refitted", "refit", "metric and router, along the cut model" if pricing.refit else None),
            ("refined", "refine", refined if pricing.refine else None),
        ):
            if text or name in declined:
                lines += _labelled(label, text or f"no: {declined[name]}", _WHY_LINES)
    if (multiple := max((cut.multiple for cut in plan.tokens), default=1)) > 1:
        lines += _labelled("counts", f"of tokens are each image's own, in multiples of {multiple}")
    if plan.expected_loss is not None:
        lines += _labelled("expected", f"loss {_estimate(plan.expected_loss, ' nats')}")
    return lines


def _measured(plan: Plan) -> list[str]:
    if plan.measured is None:
        return _labelled("measured", "nothing yet")
    measured = plan.measured
    lines = [
        *_labelled("measured", f"kept MACs  {_estimate(measured.macs)}"),
        *_labelled("", f"drift KL   {_estimate(measured.drift_kl, ' nats')}"),
        *_labelled("", f"agreement  {_estimate(measured.agreement)}"),
    ]
    lines += _labelled("", measured.statement, _STATEMENT_LINES)
    if (device := plan.device) is not None:
        images = "one image" if device.batch_size == 1 else f"{device.batch_size} images"
        lines += _labelled("device", f"{images}, {device.threads} threads of {device.device}", _MADE_LINES)
        taken = f"{device.measured:.4g} [{device.low:.4g}, {device.high:.4g}] {device.unit}"
        lines += _labelled("", f"{taken}, foretold {device.foretold:.4g}", _MADE_LINES)
    if plan.points:
        kept = [point.macs for point in plan.points]
        lines += _labelled("points", f"{len(kept)} measured on the way, kept MACs {min(kept):.3g} to {max(kept):.3g}")
    verified = sorted((point for point in plan.points if point.verified), key=lambda point: point.dial)
    for number, point in enumerate(_shown(verified, plan.dial)):
        text = f"{point.dial:.3g} nats: MACs {point.macs:.3f}, drift {point.drift_kl:.4f}, agreement {point.agreement:.3f} (n = {point.n})"
        lines += _labelled("this run" if point.dial == plan.dial else "dial" if number == 0 else "", text)
    return lines


def _shown(verified: Sequence[OperatingPoint], own: float | None) -> list[OperatingPoint]:
    """A few of the points: both ends of the verified range, the run's own and some between."""
    last, middle = len(verified) - 1, next((place for place, point in enumerate(verified) if point.dial == own), len(verified) // 2)
    return [verified[place] for place in sorted({0, middle // 2, middle, (middle + last) // 2, last})] if verified else []


def _budget(budget: Budget) -> str:
    limit = {
        "macs": f"at most {budget.value:.4g} of the MACs",
        "loss": f"at most {budget.value:.4g} nats of loss",
        "disagreement": f"at most {budget.value:.4g} of the decisions changed",
        "latency": f"at most {budget.value:.4g} of the dense model's time",
        "latency_ms": f"at most {budget.value:.4g} ms",
        "energy": f"at most {budget.value:.4g} of the dense model's energy",
    }[budget.kind]
    return f"{limit}, confidence {budget.confidence:g}"


def _estimate(estimate: Estimate, unit: str = "") -> str:
    return f"{estimate.mean:.4g} +- {estimate.stderr:.2g}{unit} (n = {estimate.n})"


def _labelled(label: str, text: str, most: int = 1) -> list[str]:
    parts = [text] if most == 1 else textwrap.wrap(_printable(text), _COLUMNS - _LABEL, max_lines=most, placeholder=" ...")
    return [f"{label if number == 0 else '':<{_LABEL}}{part}" for number, part in enumerate(parts)]


def _table(plan: Plan, room: int) -> list[str]:
    heads = {cut.block: cut for cut in plan.heads}
    gates = {gate.block: gate for gate in plan.gates}
    tokens = {cut.block: cut for cut in plan.tokens}
    largest = {kind: max((_size(cut) for cut in plan.tokens if _kind(cut) == kind), default=0.0) for kind in ("price", "count")}
    rows = []
    for block in range(plan.model.anatomy.depth):
        cut = tokens.get(block)
        bar = "" if cut is None else "#" * round(_BAR * _size(cut) / (largest[_kind(cut)] or 1.0))
        rows.append((str(block), f"{_tokens(cut):<25}{_heads(heads.get(block), gates.get(block), plan):<26}{bar}".rstrip()))
    note = f"{'block':>7}  {'tokens':<25}{'heads out':<26}cut, largest = {_BAR} #"
    if plan.skip_unread:
        return [note, *_rows(rows, room - 1), "         the last block computes only the tokens the classifier reads"]
    return [note, *_rows(rows, room)]


def _rows(rows: list[tuple[str, str]], room: int) -> list[str]:
    if len(rows) > room:
        rows = _joined(rows)
    lines = [f"{block:>7}  {text}" for block, text in rows]
    if len(lines) > room:
        half = (room - 1) // 2
        left_out = len(lines) - 2 * half
        lines = [*lines[:half], f"{'...':>7}  {left_out} more lines, see plan.toml", *lines[-half:]]
    return lines


def _joined(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for block, text in rows:
        if joined and joined[-1][1] == text:
            joined[-1] = (f"{joined[-1][0].split('-')[0]}-{block}", text)
        else:
            joined.append((block, text))
    return joined


def _kind(cut: TokenCut) -> str:
    return "count" if cut.threshold is None else "price"


def _size(cut: TokenCut) -> float:
    return float((cut.remove or 0) if cut.threshold is None else cut.threshold)


def _tokens(cut: TokenCut | None) -> str:
    if cut is None:
        return "-"
    return f"{cut.combine} {cut.remove}" if cut.threshold is None else f"{cut.combine} if < {cut.threshold:.3g} nats"


def _heads(cut: HeadCut | None, gate: HeadGate | None, plan: Plan) -> str:
    count = "" if cut is None else f"{len(cut.remove)} of {plan.model.anatomy.heads}"
    if gate is not None:
        return f"{count}, if <= {gate.threshold:.2g}" if count else f"if <= {gate.threshold:.3g} nats"
    return "-" if cut is None else _clip(f"{count}: {', '.join(map(str, cut.remove))}", 25)


def _printable(line: str) -> str:
    # Names and statements come from elsewhere: a line break or an escape sequence in one must not break the screen.
    return "".join(character if character.isprintable() else " " for character in line)


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
