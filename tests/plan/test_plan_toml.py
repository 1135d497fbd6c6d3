from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import hesper.plan
from hesper.errors import UsageError
from hesper.plan import Budget, Plan, dumps, loads, plan_hash, read_plan, validate
from strategies import EXAMPLE_PLAN as PLAN
from strategies import plans

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def changed(path: str, value: Any, plan: Any = PLAN) -> Any:
    """The plan with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    old = getattr(plan, name) if not name.isdigit() else plan[int(name)]
    new = changed(rest, value, old) if rest else value
    if name.isdigit():
        return (*plan[: int(name)], new, *plan[int(name) + 1 :])
    return dataclasses.replace(plan, **{name: new})


@given(plans())
def test_the_round_trip_is_exact(plan: Plan) -> None:
    text = dumps(plan)
    assert loads(text) == plan
    assert dumps(loads(text)) == text
    assert plan_hash(loads(text)) == plan_hash(plan)


@given(plans(), plans())
def test_plans_hash_alike_exactly_when_they_are_equal(left: Plan, right: Plan) -> None:
    assert (plan_hash(left) == plan_hash(right)) == (left == right)


def test_the_file_reads_in_the_order_people_ask() -> None:
    document = tomllib.loads(dumps(PLAN))
    order = "schema schedule skip_unread dial model budget pricing expected_loss tokens heads gates measured device points provenance"
    assert list(document) == order.split()
    assert document["tokens"][1] == {"block": 6, "combine": "drop", "remove": 20, "multiple": 1}


def test_the_hash_ignores_formatting() -> None:
    lines = [line.replace(" = ", "=") for line in dumps(PLAN).splitlines() if line and not line.startswith("#")]
    text = "# other words\n" + "\n\n".join(lines) + "\n"
    assert text != dumps(PLAN)
    assert plan_hash(loads(text)) == plan_hash(PLAN)


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [leaf for name in names for leaf in leaves(getattr(value, name), f"{path}.{name}")]
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, f"{path}.{index}")]
    return [(path[1:], value)]


@pytest.mark.parametrize(("path", "value"), leaves(PLAN))
def test_every_field_changes_the_hash(path: str, value: Any) -> None:
    other: Any = "other" if value is None or isinstance(value, str) else (7, 8) if isinstance(value, tuple) else value + 1
    if isinstance(value, bool):
        other = not value
    if value is None:
        other = 3
    assert plan_hash(changed(path, other)) != plan_hash(PLAN)


def test_numpy_scalars_and_the_sign_of_zero_do_not_matter() -> None:
    numpy = changed("tokens.0.threshold", np.float64(0.001), changed("provenance.seed", np.int64(0)))
    assert dumps(numpy) == dumps(PLAN)
    assert plan_hash(numpy) == plan_hash(PLAN)
    assert plan_hash(changed("pricing.gamma", -0.0)) == plan_hash(changed("pricing.gamma", 0.0))


def test_whole_numbers_serve_as_floats() -> None:
    assert loads(dumps(PLAN).replace("temperature = 4.0", "temperature = 4")) == PLAN


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threshold = ", "treshold = ", "unknown key tokens.0..treshold; did you mean 'threshold'"),
        ("[pricing]", "[princing]", "unknown key princing; did you mean 'pricing'"),
        ("depth = 12\n", "", "lacks the key model.anatomy.depth; add it"),
        ("[model]", "[[model]]", "model must be a table, not an array"),
        ("seed = 0", 'seed = "0"', "provenance.seed must be a whole number, not a string"),
        ("seed = 0", "seed = 0.5", "provenance.seed must be a whole number, not a number"),
        ("seed = 0", "seed = true", "provenance.seed must be a whole number, not true or false"),
        ("skip_unread = true", "skip_unread = 1", "skip_unread must be true or false, not a whole number"),
        ("seed = 0", f"seed = {2**63}", "provenance.seed does not fit into 64 bits"),
        ("seed = 0", f"seed = 1{'0' * 5000}", "not valid TOML"),
        ("seed = 0", "seed = 2026-01-01", "provenance.seed must be a whole number, not a date"),
        ("remove = [0, 2]", 'remove = [0, "2"]', r"heads\[0\].remove\[1\] must be a whole number, not a string"),
        ("grid = [14, 14]", "grid = [14]", "model.anatomy.grid needs 2 values, not 1"),
        ('combine = "merge"', 'combine = "merg"', "combine is 'merg'; did you mean 'merge'.*one of merge, drop"),
        ("schema = 6", "schema = 7", "schema 7, newer than this hesper reads .6.; upgrade hesper"),
        ("schema = 6", "schema = 3", "schema 3, but this hesper reads 6; make the plan again"),
        ("schema = 6\n", "", "needs the line 'schema = 6'"),
        ("schema = 6", "schema = ", "not valid TOML"),
        ("threshold = 0.001", "threshold = nan", r"tokens\[0\].threshold is nan"),
        ("threshold = 0.001", "threshold = inf", r"tokens\[0\].threshold is inf"),
        ("threshold = 0.001", "threshold = -0.5", r"tokens\[0\].threshold is -0.5; a price in nats is 0 or more"),
    ],
)
def test_a_text_that_says_it_wrong_is_refused(old: str, new: str, message: str) -> None:
    text = dumps(PLAN)
    assert old in text
    with pytest.raises(UsageError, match=message):
        loads(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tokens.1.block", 12, r"tokens\[1\].block is 12, but the model has blocks 0 to 11"),
        ("tokens.0.block", -1, r"tokens\[0\].block is -1"),
        ("tokens.1.block", 3, "cuts block 3 a second time"),
        ("tokens.0.block", 7, r"tokens\[1\] .block 6. comes after block 7; sort"),
        ("tokens.0.threshold", None, "either a threshold .* or remove"),
        ("tokens.0.remove", 3, "either a threshold .* or remove"),
        ("tokens.1.remove", -1, "a count of tokens is 0 or more"),
        ("tokens.1.remove", 196, "the model has 196 patch tokens and one must stay"),
        ("tokens.0.multiple", 0, r"tokens\[0\].multiple is 0; it must be at least 1 .any count. and below"),
        ("tokens.0.multiple", 197, r"tokens\[0\].multiple is 197"),
        ("tokens.1.multiple", 2, r"tokens\[1\] removes exactly 20 tokens and cannot heed a multiple"),
        ("pricing", None, r"no \[pricing\] to compare it with"),
        ("heads.0.block", 99, r"heads\[0\].block is 99"),
        ("heads.0.remove", (), "is empty"),
        ("heads.0.remove", (2, 0), "in ascending order"),
        ("heads.0.remove", (1, 1), "each head once"),
        ("gates.0.block", 12, r"gates\[0\].block is 12, but the model has blocks 0 to 11"),
        ("gates.1.block", 4, r"gates\[1\] cuts block 4 a second time"),
        ("gates.0.threshold", -1.0, r"gates\[0\].threshold is -1.0; a price in nats is 0 or more"),
        ("gates.0.threshold", float("nan"), r"gates\[0\].threshold is nan"),
        ("heads.0.remove", (3,), "block 2 has heads 0 to 2"),
        ("heads.0.remove", (-1,), "block 2 has heads 0 to 2"),
        ("heads.0.remove", (0, 1, 2), "removes all 3 heads of block 2; keep at least one"),
        ("pricing.temperature", 0.0, "must be above 0"),
        ("pricing.draws", 0, "at least 1"),
        ("pricing.rank", 193, "between 0 and the model's width, 192"),
        ("pricing.gamma", -1.0, "pricing.gamma is -1.0"),
        ("budget", Budget("macs", 1.5, 0.95), "above 0 and be at most 1"),
        ("budget.value", -1.0, "the loss budget must be above 0"),
        ("budget", Budget("disagreement", 2.0, 0.95), "between 0 and 1"),
        ("budget", Budget("latency", 1.2, 0.95), "the share of the dense model's time must lie above 0 and be at most 1"),
        ("budget", Budget("energy", 0.0, 0.95), "the share of the dense model's energy must lie above 0"),
        ("budget", Budget("latency_ms", 0.0, 0.95), "the latency must be above 0 ms"),
        ("device.batch_size", 0, "device needs a batch_size, threads and processes of at least 1"),
        ("device.low", 0.7, "device.measured must lie between low and high"),
        ("device.foretold", 0.0, "all must be above 0"),
        ("budget.confidence", 1.0, "the confidence must lie between 0 and 1"),
        ("expected_loss.stderr", -1.0, "expected_loss has stderr -1.0"),
        ("measured.macs.n", 0, "measured.macs has stderr"),
        ("measured.drift_kl.mean", float("nan"), "measured.drift_kl.mean is nan"),
        ("measured.drift_kl.mean", np.float32("nan"), "measured.drift_kl.mean is nan"),
        ("points.0.agreement", 1.5, r"points\[0\] needs"),
        ("provenance.seed", -1, "provenance.seed"),
        ("model.anatomy.depth", 0, "model.anatomy.depth is 0"),
        ("model.anatomy.grid", (0, 14), "grid must be at least 1"),
        ("model.anatomy.readout_macs", -1, "must be 0 or more"),
        ("model.anatomy.prefix_tokens", 197, "prefix_tokens is 197"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_neither_accepted_nor_written(path: str, value: Any, message: str) -> None:
    plan = changed(path, value)
    with pytest.raises(UsageError, match=message):
        validate(plan)
    with pytest.raises(UsageError, match=message):
        dumps(plan)


def test_a_name_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        dumps(changed("model.name", "a\udc80b"))


def test_reading_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(UsageError, match="there is no plan at"):
        read_plan(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"plan\.toml cannot be read as a plan"):
        read_plan(path)
    path.write_text("schema = 9", encoding="utf-8")
    with pytest.raises(UsageError, match=r"plan\.toml: the plan has schema 9"):
        read_plan(path)
    path.write_text(dumps(PLAN), encoding="utf-8")
    assert read_plan(path) == PLAN


def test_plans_need_no_torch() -> None:
    code = "import sys, hesper.plan; print(sorted({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    source = Path(hesper.plan.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
