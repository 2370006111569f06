"""The list of what a release is made of, for machines: CycloneDX 1.6 in JSON, out of the locks.

Each package is there with its version, the hashes of its published files, the machines that need it and
what uses it. The same locks give the same file, byte for byte: it has no time of day and no number of its own.

    python -m release.sbom FILE
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from release.locks import ROOT, RUNTIME, TORCH, Pin, read

MARKER = "quire:marker"
"""Property of a package that not all machines need: which do."""


class BadSbom(Exception):
    """What was made is not what CycloneDX is."""


def made(pins: Iterable[Pin]) -> str:
    """The list of these."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    root = Component(
        name=project["name"],
        version=project["version"],
        type=ComponentType.APPLICATION,
        bom_ref=project["name"],
        description=project["description"],
        purl=PackageURL("pypi", None, project["name"], project["version"]),
        licenses=[DisjunctiveLicense(id=project["license"])],
    )
    bom = Bom()
    bom.metadata.component = root
    every = list(pins)
    parts: dict[str, list[Component]] = {project["name"]: [root]}
    made_of: list[Component] = []
    for pin in every:
        purl = PackageURL("pypi", None, pin.name, pin.version)
        part = Component(
            name=pin.name,
            version=pin.version,
            type=ComponentType.LIBRARY,
            bom_ref=f"{pin.name}@{pin.version}",
            purl=purl,
            properties=[Property(name=MARKER, value=pin.marker)] if pin.marker else [],
            external_references=[
                ExternalReference(
                    type=ExternalReferenceType.DISTRIBUTION,
                    url=XsUri(purl.to_string()),
                    hashes=[HashType(alg=HashAlgorithm.SHA_256, content=each) for each in pin.hashes],
                )
            ],
        )
        bom.components.add(part)
        made_of.append(part)
        parts.setdefault(pin.name, []).append(part)
    needed: dict[str, list[Component]] = {}
    for pin, part in zip(every, made_of, strict=True):
        for user in pin.via:
            needed.setdefault(user, []).append(part)
    for user, uses in needed.items():
        for each in parts[user]:
            bom.register_dependency(each, uses)
    found = json.loads(JsonV1Dot6(bom).output_as_string())
    found.pop("serialNumber", None)
    found["metadata"].pop("timestamp", None)
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def check(text: str) -> None:
    """Raises `BadSbom` for what CycloneDX does not allow."""
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise BadSbom(str(error))


def pinned() -> list[Pin]:
    """All that the locks have."""
    return [pin for path in (RUNTIME, TORCH) for pin in read(path.read_text())]


if __name__ == "__main__":
    written = made(pinned())
    check(written)
    Path(sys.argv[1]).write_text(written)
