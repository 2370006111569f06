"""The kinds of resources that manifests may declare, and which of them this version refuses as a whole."""

from __future__ import annotations

from quire_schemas import git_source
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
KIND_REFUSALS = {
    "GitSource": git_source.KIND_REFUSED,
}
READ_ONLY_KINDS = ("Revision", "Replica", "Event")
