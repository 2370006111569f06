"""Kind `AccessPolicy`: API keys by reference or hash, what they may call, and how much.

The schema is complete, so that documents can be written and checked against it; applying one is refused by
this version (`KIND_REFUSED`): a policy that is stored and not enforced would be worse than none. Until then
the API listens on loopback only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quire_schemas.quantities import Duration
from quire_schemas.resource import Resource, Strict, declared, section

KIND_REFUSED = "there are no access policies yet; the API listens on loopback addresses only"


class KeySource(Strict):
    """Where the value of a key comes from; exactly one."""

    secret_ref: str | None = declared("Name of a secret stored with the platform.", None, update="hot")
    file: str | None = declared("File that holds the value.", None, update="hot")
    env: str | None = declared("Variable of the control plane's environment.", None, update="hot")


class ApiKey(Strict):
    """One key: exactly one of `valueFrom` and `hash`."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")] = declared(
        "What the key is called in usage figures and logs.", update="hot"
    )
    value_from: KeySource | None = section(KeySource, "Where the value comes from.", optional=True)
    hash: str | None = declared(
        "SHA-256 of the key, as printed when it was made.", None, update="hot", min_length=1, max_length=512
    )


class Allow(Strict):
    """What the keys may call."""

    models: Annotated[tuple[str, ...], Field(strict=False, max_length=256)] = declared(
        "Model names; empty: all.", (), update="hot"
    )
    operations: Annotated[
        tuple[Literal["chat", "completions", "embeddings", "rerank", "responses", "messages", "batches"], ...],
        Field(strict=False),
    ] = declared("Operations; empty: all.", (), update="hot")


class Limit(Strict):
    """One bound: `requests` or `tokens` per time, or `concurrency`. The first one hit answers 429."""

    scope: Literal["key", "policy"] = declared("Whether each key counts for itself.", "key", update="hot")
    requests: int | None = declared("Requests per time.", None, update="hot", ge=1, le=10**12)
    tokens: int | None = declared("Tokens per time.", None, update="hot", ge=1, le=10**15)
    per: Duration | None = declared("The time that requests and tokens count in.", None, update="hot")
    concurrency: int | None = declared("Requests at the same time.", None, update="hot", ge=1, le=10**6)


class AccessPolicySpec(Strict):
    """Who may call what, and how much."""

    keys: Annotated[tuple[ApiKey, ...], Field(strict=False, max_length=1024)] = declared(
        "The keys this policy holds for. Values never stand here.", update="hot"
    )
    allow: Allow = section(Allow, "What the keys may call.")
    limits: Annotated[tuple[Limit, ...], Field(strict=False, max_length=64)] = declared(
        "Bounds; the first one hit answers 429.", (), update="hot"
    )
    priority: int = declared(
        "Rank in the queue where batching.policy is priority; higher goes first.",
        0,
        update="hot",
        ge=-1000,
        le=1000,
    )
    expires_at: (
        Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$")] | None
    ) = declared("When the keys stop working, RFC 3339.", None, update="hot")


class AccessPolicy(Resource):
    """API keys and what they may do."""

    kind: Literal["AccessPolicy"] = declared("Which kind of object this is.", update="immutable")
    spec: AccessPolicySpec = Field(
        ...,
        description="Who may call what, and how much.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": KIND_REFUSED},
    )
