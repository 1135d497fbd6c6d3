"""A plan as TOML text: written in a fixed order, read strictly, hashed by what it means."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hesper.errors import UsageError
from hesper.plan.validate import validate
from hesper.plan.vocabulary import SCHEMA, Plan
from hesper.registry import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["dumps", "loads", "plain", "plan_hash", "read_plan"]

_ORDER = ("schema", "schedule", "skip_unread", "dial", "model", "budget", "pricing", "expected_loss")
_ORDER_AFTER = ("tokens", "heads", "gates", "measured", "device", "points", "provenance")
_TYPE_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a table", list: "an array"}
_INLINE_KEYS = 3  # estimates read best on one line, anatomies do not


def dumps(plan: Plan) -> str:
    """The plan as TOML; ``loads`` gives the same plan back. A plan that breaks a rule of ``validate`` raises UsageError."""
    validate(plan)
    document = plain(plan)
    lines = ["# What hesper cuts from a model, why, and what it was measured to cost."]
    for key in (*_ORDER, *_ORDER_AFTER):
        if key in document:
            lines += _write(key, document[key])
    return "\n".join(lines) + "\n"


def loads(text: str) -> Plan:
    """The plan in a TOML text; UsageError names the key that is unknown, missing, of the wrong type or out of range."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib lets numbers of thousands of digits fail on their own
        raise UsageError(f"the plan is not valid TOML: {error}; mend that place or make the plan again") from error
    schema = document.get("schema")
    if type(schema) is not int:
        raise UsageError(f"the plan needs the line 'schema = {SCHEMA}', which says what its keys mean; add it")
    if schema > SCHEMA:
        raise UsageError(f"the plan has schema {schema}, newer than this hesper reads ({SCHEMA}); upgrade hesper")
    if schema < SCHEMA:  # before its keys are read, which may mean other things
        raise UsageError(f"the plan has schema {schema}, but this hesper reads {SCHEMA}; make the plan again")
    plan: Plan = _decode(document, Plan, "")
    validate(plan)
    return plan


def read_plan(path: str | Path) -> Plan:
    """The plan in a TOML file; UsageError names the file when it cannot be read or holds no valid plan."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no plan at {path}; give a plan.toml or a RUN folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a plan ({error}); give a plan.toml or a RUN folder") from error
    try:
        return loads(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as dictionaries, lists, words and numbers, under the keys of its TOML; what is None is left out."""
    document: dict[str, Any] = _encode(plan, Plan)
    return document


def plan_hash(plan: Plan) -> str:
    """SHA-256 (64 hex digits) of what the plan says: the same for any formatting, another for any other field value."""
    canonical = json.dumps(plain(plan), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return inner, True
    return hint, False


def _encode(value: Any, hint: Any) -> Any:
    # Fields are coerced to their declared type, so a plan made of numpy scalars writes and hashes like one of Python's own.
    hint, _ = _strip_optional(hint)
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]  # is_dataclass narrows to an instance as well
        pairs = ((name, getattr(value, name)) for name in hints)
        return {name: _encode(item, hints[name]) for name, item in pairs if not (item is None or (isinstance(item, tuple) and not item))}
    if get_origin(hint) is tuple:
        return [_encode(item, get_args(hint)[0]) for item in value]
    if hint is float:
        return float(value) + 0.0  # -0.0 equals 0.0, so it must hash alike
    if hint is int:
        return operator.index(value)
    return bool(value) if hint is bool else str(value)


def _decode(value: Any, hint: Any, path: str) -> Any:
    hint, _ = _strip_optional(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_table(_expect(value, dict, path), hint, path)
    if get_origin(hint) is tuple:
        return _decode_tuple(_expect(value, list, path), get_args(hint), path)
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if value not in options:
            raise UsageError(f"{path} is {value!r}; {did_you_mean(str(value), options)} (one of {', '.join(options)})")
        return value
    return _expect(value, hint, path)


def _decode_table(table: Mapping[str, Any], cls: Any, path: str) -> Any:
    hints = _hints(cls)
    prefix = f"{path}." if path else ""
    for key in table:
        if key not in hints:
            raise UsageError(f"the plan has an unknown key {prefix + key}; {did_you_mean(key, hints)}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if name in table:
            values[name] = _decode(table[name], hint, prefix + name)
        elif _strip_optional(hint)[1]:
            values[name] = None
        elif get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
            values[name] = ()
        else:
            raise UsageError(f"the plan lacks the key {prefix + name}; add it")
    return cls(**values)


def _decode_tuple(items: list[Any], hints: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if hints[-1] is not Ellipsis and len(items) != len(hints):
        raise UsageError(f"{path} needs {len(hints)} values, not {len(items)}")
    return tuple(_decode(item, hints[0], f"{path}[{index}]") for index, item in enumerate(items))


def _expect(value: Any, kind: type, path: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)  # "temperature = 4" is what people write
    if type(value) is not kind:
        raise UsageError(f"{path} must be {_TYPE_NAMES[kind]}, not {_TYPE_NAMES.get(type(value), 'a date or time')}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"{path} does not fit into 64 bits; give a smaller number")
    return value


def _write(name: str, value: Any) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [line for item in value for line in ("", f"[[{name}]]", *_pairs(item))]
    if not isinstance(value, dict):
        return [f"{name} = {_literal(value)}"]
    own = {key: item for key, item in value.items() if not _is_subtable(item)}
    lines = ["", f"[{name}]", *_pairs(own)]
    for key, item in value.items():
        if _is_subtable(item):
            lines += _write(f"{name}.{key}", item)
    return lines


def _is_subtable(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > _INLINE_KEYS


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_literal(value)}" for key, value in table.items()]


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(_pairs(value))} }}"
    return repr(value)  # repr of a float is the shortest text that reads back as the same float


def _quoted(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!a} cannot be written to a plan because it is not valid Unicode; rename it") from error
    # TOML's basic strings are JSON's, but for the delete character, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
