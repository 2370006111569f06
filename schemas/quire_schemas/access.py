"""Kind `AccessPolicy`: API keys by reference or hash, what they may call, and how much.

A policy is a tenant: its keys share what they have made (files, batches, responses), the cache of prompts, and the
limits of scope `policy`. As soon as there is one policy, requests without a key are answered with 401.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from quire_schemas.keys import HASH, masked
from quire_schemas.model import SECRET_NAME, EnvName
from quire_schemas.quantities import BadQuantity, Duration, Money, Percent, parse_duration
from quire_schemas.resource import HONOURED, Resource, Strict, declared, section

Operation = Literal[
    "chat", "completions", "embeddings", "score", "responses", "messages", "batches", "tokenize", "metrics"
]
Calendar = Literal["day", "week", "month"]
MAX_ROLLING_DAYS = 31


def _a_time(text: str) -> str:
    if not 1 <= parse_duration(text) <= 366 * 86400:
        raise BadQuantity(f"'{text}' is below a second or above a year", "for example '1m' or '24h'")
    return text


def _time_of_budget(value: Any) -> Any:
    if not isinstance(value, str) or value in get_args(Calendar):
        return value
    hint = "'day', 'week' or 'month' of the calendar, or whole hours such as '24h' or '7d'"
    try:
        seconds = parse_duration(value)
    except BadQuantity as error:
        raise BadQuantity(f"'{value[:40]}' is no time of a budget", hint) from error
    if seconds % 3600 or not 3600 <= seconds <= MAX_ROLLING_DAYS * 86400:
        raise BadQuantity(f"'{value}' is not in whole hours, from one to {MAX_ROLLING_DAYS} days", hint)
    return value


def _moment(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise BadQuantity(f"'{text}' is no time", "for example '2027-01-01T00:00:00Z'") from None
    return text


def _a_name(text: str) -> str:
    if "*" in text:
        hint = "name each model; to allow all of them leave models out"
        raise BadQuantity(f"'{text[:40]}' is no name of a model: none has '*', and none stands for others", hint)
    return text


def _no_key(text: str) -> str:
    if masked(text) != text:
        hint = "give the name of what holds the key, and replace the key if others may have seen this"
        raise BadQuantity("is the key itself, not a name", hint)
    return text


class KeySource(Strict):
    """Where the value of a key comes from; exactly one."""

    secret_ref: Annotated[str, StringConstraints(pattern=SECRET_NAME), AfterValidator(_no_key)] | None = declared(
        "Name of a secret stored with the platform: platform secret set NAME.", None, update="hot"
    )
    file: str | None = declared(
        "Absolute path of a file that holds the value alone. What is written there later counts within seconds.",
        None,
        update="hot",
        min_length=1,
        max_length=4096,
    )
    env: Annotated[EnvName, AfterValidator(_no_key)] | None = declared(
        "Variable of the control plane's environment.", None, update="hot"
    )


class ApiKey(Strict):
    """One key: exactly one of `valueFrom` and `hash`."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")] = declared(
        "What the key is called in usage figures and logs.", update="hot"
    )
    value_from: KeySource | None = section(KeySource, "Where the value comes from.", optional=True)
    hash: Annotated[str, StringConstraints(pattern=HASH)] | None = declared(
        "SHA-256 of the key, as platform key create prints it; of a string of your own: sha256: and its digest.",
        None,
        update="hot",
    )


class Allow(Strict):
    """What the keys may call."""

    models: Annotated[tuple[Annotated[str, AfterValidator(_a_name)], ...], Field(strict=False, max_length=256)] = (
        declared("Names of models and routes, as requests give them; empty: all.", (), update="hot")
    )
    operations: Annotated[tuple[Operation, ...], Field(strict=False, max_length=64)] = declared(
        "Operations; empty: all but metrics, which must be named. batches includes files; score, tokenize and "
        "messages include what counts tokens for them.",
        (),
        update="hot",
    )


class Limit(Strict):
    """One bound: `requests` or `tokens` per time, or `concurrency`; exactly one. The first one hit answers 429."""

    scope: Literal["key", "policy"] = declared("Whether each key counts for itself.", "key", update="hot")
    requests: int | None = declared("Requests per time.", None, update="hot", ge=1, le=10**12)
    tokens: int | None = declared("Tokens per time.", None, update="hot", ge=1, le=10**15)
    per: Annotated[Duration, AfterValidator(_a_time)] | None = declared(
        "The time that requests and tokens count in: so many may come at once, and as many come back evenly.",
        None,
        update="hot",
    )
    concurrency: int | None = declared("Requests at the same time.", None, update="hot", ge=1, le=10**6)


class Budget(Strict):
    """What may be spent in a time: `tokens` or `cost`, exactly one. When it is spent, requests get 429
    `insufficient_quota`."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = declared(
        "What the budget is called in answers, figures and metrics.", update="hot"
    )
    scope: Literal["key", "policy"] = declared(
        "Whether each key has the budget for itself.", "policy", update="hot"
    )
    tokens: int | None = declared("Tokens that may be spent.", None, update="hot", ge=1, le=10**15)
    counts: Literal["total", "prompt", "completion"] = declared(
        "Which tokens count, where it is one of tokens: all, those of prompts, or those of answers.",
        "total",
        update="hot",
    )
    cached: Literal["full", "free"] = declared(
        "Whether tokens of prompts that were found in the cache count, where it is one of tokens. What they cost "
        "is the Model's spec.prices.cachedInput.",
        "full",
        update="hot",
    )
    cost: Money | None = declared(
        "Money that may be spent, in whatever the spec.prices of Models are in. Without prices a Model costs "
        "nothing.",
        None,
        update="hot",
    )
    per: Annotated[Calendar | Duration, BeforeValidator(_time_of_budget)] = declared(
        "The time it is for: a day, a week (from Monday on) or a month of the calendar, in UTC; or the last so "
        "many hours, of which one that is partly over counts whole, from 1h to 31d.",
        update="hot",
    )
    warn_at: Percent = declared(
        "The share from which on answers, metrics and an event warn of its end.", "80%", update="hot"
    )


class AccessPolicySpec(Strict):
    """Who may call what, and how much."""

    keys: Annotated[tuple[ApiKey, ...], Field(strict=False, max_length=1024)] = declared(
        "The keys this policy holds for. Values never stand here.", update="hot"
    )
    allow: Allow = section(Allow, "What the keys may call.")
    limits: Annotated[tuple[Limit, ...], Field(strict=False, max_length=64)] = declared(
        "Bounds; the first one hit answers 429.", (), update="hot"
    )
    budgets: Annotated[tuple[Budget, ...], Field(strict=False, max_length=16)] = declared(
        "What may be spent in a day, a month or another time; the first one spent answers 429.", (), update="hot"
    )
    priority: int = declared(
        "Rank in the queue where batching.policy is priority; higher goes first. A request cannot raise it.",
        0,
        update="hot",
        ge=-1000,
        le=1000,
    )
    expires_at: (
        Annotated[
            str,
            StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$"),
            AfterValidator(_moment),
        ]
        | None
    ) = declared("When the keys stop working, RFC 3339; by the machine's wall clock.", None, update="hot")


class AccessPolicy(Resource):
    """API keys and what they may do."""

    kind: Literal["AccessPolicy"] = declared("Which kind of object this is.", update="immutable")
    spec: AccessPolicySpec = Field(
        ...,
        description="Who may call what, and how much.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": HONOURED},
    )
