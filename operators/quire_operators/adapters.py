"""The folders that a manifest names as adapters: what they hold, and in what that differs from a revision's.

A revision has the digest of each. So a folder that holds something else is a change of the model although its
manifest is the same; an engine refuses to start with what was not reviewed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire_operators.placement import Placement
from quire_operators.records import Revision
from quire_operators.sources import SourceError
from quire_schemas import wire
from quire_schemas.adapters import AdapterProfile, digest_of, read_adapter
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.checkpoint_files import CheckpointError, UnsupportedFeature
from quire_schemas.update import FieldChange, UpdateClass


def declared(spec: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The adapters of a resolved spec; none of one that is older than the field."""
    lora = spec.get("lora")
    return lora["adapters"] if lora is not None else ()


def read(spec: Mapping[str, Any]) -> tuple[wire.Adapter, ...]:
    """The adapters of a resolved spec as they are now. Raises `SourceError`."""
    found = []
    for index, each in enumerate(declared(spec)):
        folder = Path(each["source"].removeprefix("file://"))
        try:
            found.append(wire.Adapter(each["name"], str(folder), digest_of(folder)))
        except CheckpointError as error:
            raise SourceError("NotFound", error.message, error.hint, _field(index)) from error
    return tuple(found)


def profiles(
    spec: Mapping[str, Any], adapters: Sequence[wire.Adapter], base: ModelProfile
) -> list[tuple[wire.Adapter, AdapterProfile]]:
    """What is in their folders, checked against their base. Raises `SourceError`."""
    found = []
    for index, each in enumerate(adapters):
        try:
            found.append((each, read_adapter(Path(each.folder), base, spec["lora"]["maxRank"])))
        except CheckpointError as error:
            reason = "ConfigRejected" if isinstance(error, UnsupportedFeature) else "InvalidReference"
            raise SourceError(reason, error.message, error.hint, _field(index)) from error
    return found


def changes(spec: Mapping[str, Any], current: Revision | None) -> tuple[FieldChange, ...]:
    """What differs where an adapter has the name and the folder that it had, and is another one."""
    if current is None:
        return ()
    before = {each.name: each for each in Placement.from_dict(current.placement).adapters}
    found = []
    for each in read(spec):
        known = before.get(each.name)
        if known is not None and known.folder == each.folder and known.digest != each.digest:
            old, new = (f"file://{one.folder} (sha256 {one.digest[:12]})" for one in (known, each))
            found.append(FieldChange(f"spec.lora.adapters[{each.name}].source", old, new, UpdateClass.ROLLING))
    return tuple(found)


def _field(index: int) -> str:
    return f"spec.lora.adapters[{index}].source"
