"""The kinds of resources that manifests may declare."""

from __future__ import annotations

from quire_schemas.access import AccessPolicy
from quire_schemas.gateway import Gateway
from quire_schemas.git_source import GitSource
from quire_schemas.model import Model
from quire_schemas.resource import Resource
from quire_schemas.route import Route

KINDS: dict[str, type[Resource]] = {
    "Model": Model,
    "Route": Route,
    "AccessPolicy": AccessPolicy,
    "GitSource": GitSource,
    "Gateway": Gateway,
}
READ_ONLY_KINDS = ("Revision", "Replica", "Event")
