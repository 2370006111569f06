"""Kind `Route`: aliases, weighted splits and fallbacks over models.

The schema is complete, so that documents can be written and checked against it; applying one is refused by
this version (`KIND_REFUSED`). Every Model is reachable by its own names without a Route.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quire_schemas.quantities import Duration
from quire_schemas.resource import Name, Resource, Strict, declared, section

KIND_REFUSED = "there are no routes yet; every Model is reachable by its servedModelNames"

Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]
Failure = Literal["Unavailable", "QueueFull", "Timeout", "ContextLengthExceeded"]


class HeaderMatch(Strict):
    """One header that a request must carry."""

    name: str = declared("Header name, in any case.", update="hot", min_length=1, max_length=256)
    exact: str = declared("Its value.", update="hot", max_length=4096)


class Match(Strict):
    """Which requests a route takes."""

    model_names: Annotated[tuple[Alias, ...], Field(strict=False, min_length=1, max_length=64)] = declared(
        "Model names that clients send.", update="hot"
    )
    headers: Annotated[tuple[HeaderMatch, ...], Field(strict=False, max_length=16)] = declared(
        "Headers that must all match as well.", (), update="hot"
    )


class Backend(Strict):
    """Where a share of the requests goes."""

    model: Name = declared("Name of a Model.", update="hot")
    adapter: str | None = declared("Name of one of its adapters.", None, update="hot")
    weight: int = declared(
        "Share relative to the sum of all weights, not a percentage.", 1, update="hot", ge=0, le=1_000_000
    )


class Sticky(Strict):
    """Which requests should meet the same replica."""

    by: Annotated[str, StringConstraints(pattern=r"^(none|prefix|user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$")] = (
        declared(
            "'prefix' keeps prompts that begin alike together, 'user' and 'header:<name>' those of one caller.",
            "prefix",
            update="hot",
        )
    )


class Fallback(Strict):
    """A model that steps in."""

    model: Name = declared("Name of a Model.", update="hot")
    when: Annotated[tuple[Failure, ...], Field(strict=False, min_length=1)] = declared(
        "Failures that make it step in.", update="hot"
    )


class Timeouts(Strict):
    """How long a request may take."""

    first_token: Duration | None = declared("Until its first token.", None, update="hot")
    request: Duration | None = declared("Until its end.", None, update="hot")


class Retries(Strict):
    """Trying again, only before the first byte has been sent."""

    max_attempts: int = declared("Attempts, the first one included.", 1, update="hot", ge=1, le=10)
    when: Annotated[tuple[Literal["ConnectionError", "503"], ...], Field(strict=False)] = declared(
        "Failures that are tried again.", ("ConnectionError",), update="hot"
    )


class Mirror(Strict):
    """A copy of requests whose answers are thrown away."""

    model: Name = declared("Name of a Model.", update="hot")
    percent: int = declared("Percent of requests that are copied.", 0, update="hot", ge=0, le=100)


class RouteSpec(Strict):
    """Which requests go where."""

    match: Match = Field(
        ...,
        description="Which requests the route takes.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": "honoured"},
    )
    backends: Annotated[tuple[Backend, ...], Field(strict=False, min_length=1, max_length=64)] = declared(
        "Where the requests go, by weight.", update="hot"
    )
    sticky: Sticky = section(Sticky, "Which requests should meet the same replica.")
    fallbacks: Annotated[tuple[Fallback, ...], Field(strict=False, max_length=16)] = declared(
        "Models that step in, in order.", (), update="hot"
    )
    timeouts: Timeouts = section(Timeouts, "How long a request may take.")
    retries: Retries = section(Retries, "Trying again, only before the first byte has been sent.")
    mirror: Mirror | None = section(Mirror, "A copy of requests whose answers are thrown away.", optional=True)


class Route(Resource):
    """Aliases, splits and fallbacks over models."""

    kind: Literal["Route"] = declared("Which kind of object this is.", update="immutable")
    spec: RouteSpec = Field(
        ...,
        description="Which requests go where.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": KIND_REFUSED},
    )
