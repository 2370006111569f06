"""What a change means: the typed difference of two resolved specs, the class of each change, and two hashes.

Every field's declaration carries an update class. It is the class of a change as long as the running engine
can take it: a hot value that lies above what the engine allocated at its start is rolling. The class is therefore
a function of field, old value, new value and the engine's bounds.

- `template_hash` is the identity of an engine: a SHA-256 over the resolved **rolling** fields and nothing
  else, never over process arguments, paths of this machine or the platform's version. Two spellings of one
  amount (`60s`, `1m`) hash alike. Fields without a value (None, empty) are left out, so a release that adds an
  optional field changes no hash.
- `hot_hash` covers the hot fields that an engine acts on (`ENGINE_HOT`). The engine reports the hash it runs.

Resolved specs are what `model.resolve_defaults` gives. Both hashes are pinned by golden files: a change of
theirs would restart every running model on upgrade.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from quire_schemas.fields import SchemaField, Shape, fields_of
from quire_schemas.model import ModelSpec
from quire_schemas.resource import Resource, Strict, update_tag

ENGINE_HOT = (
    "batching.maxNumSeqs",
    "batching.maxNumBatchedTokens",
    "batching.maxPrefillTokens",
    "batching.chunkedPrefill",
    "batching.policy",
    "batching.maxQueueLength",
)
"""Hot fields that are pushed to running engines; the others are the router's and the control plane's."""


class UpdateClass(StrEnum):
    """What has to happen for a change to take effect."""

    HOT = "hot"
    SCALE = "scale"
    ROLLING = "rolling"
    IMMUTABLE = "immutable"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds that running engines allocated for at their start; hot values move below them."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field that differs. `path` begins with `spec.`; items of named lists are `spec.env[NAME]`.

    `old` is None for what is new and `new` for what is gone. `note` says why the class is not the field's usual
    one, or is empty.
    """

    path: str
    old: Any
    new: Any
    update: UpdateClass
    note: str = ""


def diff(
    old: Mapping[str, Any], new: Mapping[str, Any], limits: EngineLimits | None = None
) -> tuple[FieldChange, ...]:
    """The fields in which two resolved specs differ, in the order of the schema.

    `limits` are those of the running engines, if there are any. Two spellings of one amount are no difference.
    """
    changes = []
    for path, before, after, tag in _differences(ModelSpec, old, new, "spec"):
        update, note = _classify(path, after, UpdateClass(tag), limits, new)
        changes.append(FieldChange(path, before, after, update, note))
    return tuple(changes)


def diff_other(kind: type[Resource], old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """The fields in which two specs of a kind without engines differ. Two spellings of one amount are no
    difference."""
    spec = fields_of(kind)["spec"].shape.section
    if spec is None:
        raise TypeError(f"{kind.__name__} has no spec")
    return tuple(
        FieldChange(path, before, after, UpdateClass(tag))
        for path, before, after, tag in _differences(spec, old, new, "spec")
    )


def diff_metadata(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """The labels and annotations in which the `metadata` of two intents differ. They are always hot."""
    changes = []
    for group in ("labels", "annotations"):
        before, after = old.get(group) or {}, new.get(group) or {}
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                path = f"metadata.{group}[{name}]"
                changes.append(FieldChange(path, before.get(name), after.get(name), UpdateClass.HOT))
    return tuple(changes)


def beyond_limits(resolved: Mapping[str, Any], limits: EngineLimits) -> tuple[str, ...]:
    """Paths of hot fields whose values the engine cannot take while it runs; it must be replaced for them."""
    found = []
    for name in ENGINE_HOT:
        path = f"spec.{name}"
        value = _at(resolved, name)
        if _classify(path, value, UpdateClass.HOT, limits, resolved)[0] is UpdateClass.ROLLING:
            found.append(path)
    return tuple(found)


def under_template(template: Mapping[str, Any], wanted: Mapping[str, Any], limits: EngineLimits) -> dict[str, Any]:
    """The resolved spec of an earlier revision under a newer intent: what is rolling is the revision's, what is
    hot or a number of replicas is as wanted now. A hot value that the revision's engines (`limits`) cannot take
    stays as the revision had it.
    """
    merged = _under(ModelSpec, template, wanted)
    for path in beyond_limits(merged, limits):
        *sections, name = path.removeprefix("spec.").split(".")
        section = merged
        for part in sections:
            section = section[part]
        section[name] = _at(template, path.removeprefix("spec."))
    return merged


def template_hash(resolved: Mapping[str, Any], raised: EngineLimits | None = None) -> str:
    """SHA-256 (hex) of the rolling fields of a resolved spec.

    A hot value above what engines allocated for needs new engines although no rolling field changed
    (`beyond_limits`). Whoever starts them then passes the new bounds as `raised`, so that the new template has
    another hash than the old one; None as long as hot values stay within the bounds of the first revision.
    """
    rolling = _canonical(ModelSpec, resolved, UpdateClass.ROLLING)
    if raised is not None:
        rolling["raisedLimits"] = [raised.max_num_seqs, raised.max_num_batched_tokens]
    return _sha256(rolling)


def hot_hash(resolved: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the hot fields that an engine acts on."""
    # a revision that is older than a field says nothing of it, and its engines keep what they were told
    values = {name: _at(resolved, name) for name in ENGINE_HOT}
    return _sha256({name: value for name, value in values.items() if value is not None})


def _classify(
    path: str, new: Any, tag: UpdateClass, limits: EngineLimits | None, resolved: Mapping[str, Any]
) -> tuple[UpdateClass, str]:
    """The class and the reason where it is not the tag."""
    if limits is None:
        return tag, ""
    if path == "spec.batching.maxNumSeqs" and new > limits.max_num_seqs:
        return UpdateClass.ROLLING, f"engine allocated for {limits.max_num_seqs}"
    if path == "spec.batching.maxNumBatchedTokens" and new > limits.max_num_batched_tokens:
        return UpdateClass.ROLLING, f"engine allocated for {limits.max_num_batched_tokens}"
    if path == "spec.batching.chunkedPrefill" and not new:
        room = min(limits.max_num_batched_tokens, resolved["batching"]["maxNumBatchedTokens"])
        if room < limits.max_model_len:
            return UpdateClass.ROLLING, f"whole prompts of {limits.max_model_len} tokens need a larger step"
    return tag, ""


def _differences(
    section: type[Strict], old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any, str]]:
    for name, field in fields_of(section).items():
        path, before, after = f"{prefix}.{name}", old.get(name), new.get(name)
        if _amount(field.shape, before) == _amount(field.shape, after):
            continue
        inner = field.shape.section
        if inner is not None and isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(inner, before, after, path)
        elif field.shape.kind == "list" and _is_named(field.shape):
            yield from _named_differences(field, before or [], after or [], path)
        else:
            yield path, before, after, update_tag(field.info)


def _named_differences(
    field: SchemaField, old: list[dict[str, Any]], new: list[dict[str, Any]], path: str
) -> Iterator[tuple[str, Any, Any, str]]:
    before, after = {e["name"]: e for e in old}, {e["name"]: e for e in new}
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield f"{path}[{name}]", before.get(name), after.get(name), update_tag(field.info)


def _is_named(shape: Shape) -> bool:
    """A list whose items are told apart by their `name`."""
    inner = shape.item.section if shape.item is not None else None
    return inner is not None and "name" in fields_of(inner)


def _amount(shape: Shape, value: Any) -> Any:
    """The value with units worked out, so that two spellings of one amount are equal."""
    if shape.section is not None and isinstance(value, Mapping):
        return {n: _amount(f.shape, value.get(n)) for n, f in fields_of(shape.section).items()}
    if shape.item is not None and isinstance(value, list):
        items = [_amount(shape.item, v) for v in value]
        return sorted(items, key=lambda item: str(item["name"])) if _is_named(shape) else items
    if shape.unit is not None and isinstance(value, str) and value not in shape.values:
        return shape.unit.number(value)
    return value


def _canonical(section: type[Strict], values: Mapping[str, Any], wanted: UpdateClass) -> dict[str, Any]:
    """The leaf fields of one class that have a value; sections and lists only if something is in them."""
    kept: dict[str, Any] = {}
    for name, field in fields_of(section).items():
        value = values.get(name)
        inner = field.shape.section
        if inner is not None and isinstance(value, Mapping):
            value = _canonical(inner, value, wanted)
        elif update_tag(field.info) != wanted:
            continue
        else:
            value = _without_gaps(_amount(field.shape, value))
        if value is not None and value != {} and value != []:
            kept[name] = value
    return kept


def _under(section: type[Strict], template: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(template)
    for name, field in fields_of(section).items():
        inner, before, after = field.shape.section, template.get(name), wanted.get(name)
        if inner is not None and isinstance(before, Mapping) and isinstance(after, Mapping):
            merged[name] = _under(inner, before, after)
        elif name in wanted and update_tag(field.info) in (UpdateClass.HOT, UpdateClass.SCALE):
            merged[name] = after
    return merged


def _without_gaps(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: _without_gaps(v) for n, v in value.items() if v is not None and v != [] and v != {}}
    return [_without_gaps(v) for v in value] if isinstance(value, list) else value


def _at(resolved: Mapping[str, Any], path: str) -> Any:
    *sections, name = path.split(".")
    section: Any = resolved
    for part in sections:
        section = section[part]
    return section.get(name)


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
