"""Kind `Route`: names of its own for models, weighted splits, stand-ins, copies.

Every Model is reachable by its own names without a Route. A Route takes requests for other names, or for names of
Models where they carry certain headers. All of it is the router's, so that every change is hot.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quire_schemas.failures import DEFAULT_ATTEMPTS, Failure, Retried
from quire_schemas.quantities import Duration
from quire_schemas.resource import HONOURED, Name, Resource, Strict, declared, section

Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]


class HeaderMatch(Strict):
    """One header that a request must carry."""

    name: str = declared("Header name, in any case.", update="hot", min_length=1, max_length=256)
    exact: str = declared("Its value.", update="hot", max_length=4096)


class Match(Strict):
    """Which requests a route takes."""

    model_names: Annotated[tuple[Alias, ...], Field(strict=False, min_length=1, max_length=64)] = declared(
        "Model names that clients send. With headers they may be names of a Model or of another Route, which then "
        "has the requests without these headers.",
        update="hot",
    )
    headers: Annotated[tuple[HeaderMatch, ...], Field(strict=False, max_length=16)] = declared(
        "Headers that must all match as well. Of several routes that match, the one with more headers has the "
        "request. Lines of batches and responses in the background have no headers.",
        (),
        update="hot",
    )


class Backend(Strict):
    """Where a share of the requests goes."""

    model: Name = declared(
        "Name of a Model. While there is none of that name, its share goes to the others.", update="hot"
    )
    adapter: str | None = declared(
        "Name of one of its adapters. While it has none of that name, the share goes to the others.",
        None,
        update="hot",
    )
    weight: int = declared(
        "Share relative to the sum of all weights, not a percentage; 0: none.",
        1,
        update="hot",
        ge=0,
        le=1_000_000,
    )


class Sticky(Strict):
    """Which requests should meet the same backend and replica."""

    by: Annotated[str, StringConstraints(pattern=r"^(none|prefix|user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$")] = (
        declared(
            "'prefix' sends prompts that begin alike to the replica that has their beginning computed. 'user' and "
            "'header:<name>' keep the requests of one caller, as the request or that header names him, with one "
            "backend and one of its replicas, as long as that is not much busier than the others. 'none' goes by "
            "load alone.",
            "prefix",
            update="hot",
        )
    )


class Fallback(Strict):
    """A model that steps in, as long as nothing of the answer was sent."""

    model: Name = declared("Name of a Model.", update="hot")
    adapter: str | None = declared("Name of one of its adapters, with which it steps in.", None, update="hot")
    when: Annotated[tuple[Failure, ...], Field(strict=False, min_length=1, max_length=4)] = declared(
        "Failures that make it step in. Unavailable: the model is not there, has no replica that gets ready in "
        "time, or its engines die under the request. QueueFull: it takes no more. Timeout: the request waited too "
        "long for its turn, or for its first token. ContextLengthExceeded: it is too long for the model.",
        update="hot",
    )


class Timeouts(Strict):
    """How long a request may take. What nobody waits for, such as lines of batches, may take longer."""

    first_token: Duration | None = declared(
        "Until its first token; of one that stands in, from its own beginning.", None, update="hot"
    )
    request: Duration | None = declared(
        "Until its end, from its arrival. A request may set itself less, in its field 'timeout'.",
        None,
        update="hot",
    )


class Retries(Strict):
    """Trying again, only before the first byte has been sent."""

    max_attempts: int = declared(
        "Attempts at one model, the first one included; the later ones within the model's budget of them.",
        DEFAULT_ATTEMPTS,
        update="hot",
        ge=1,
        le=10,
    )
    when: Annotated[tuple[Retried, ...], Field(strict=False, max_length=2)] = declared(
        "Failures that are tried again. ConnectionError: the engine died, stands still or was cut off. 503: it "
        "was about to end and did not take the request.",
        ("ConnectionError", "503"),
        update="hot",
    )


class Mirror(Strict):
    """A copy of requests whose answers are thrown away. It is made where the model has a place free for it."""

    model: Name = declared("Name of a Model.", update="hot")
    adapter: str | None = declared("Name of one of its adapters, which gets the copies.", None, update="hot")
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
    sticky: Sticky = section(Sticky, "Which requests should meet the same backend and replica.")
    fallbacks: Annotated[tuple[Fallback, ...], Field(strict=False, max_length=16)] = declared(
        "Models that step in, in order.", (), update="hot"
    )
    timeouts: Timeouts = section(Timeouts, "How long a request may take.")
    retries: Retries = section(Retries, "Trying again, only before the first byte has been sent.")
    mirror: Mirror | None = section(Mirror, "A copy of requests whose answers are thrown away.", optional=True)


class Route(Resource):
    """Names of its own for models, splits, stand-ins and copies."""

    kind: Literal["Route"] = declared("Which kind of object this is.", update="immutable")
    spec: RouteSpec = Field(
        ...,
        description="Which requests go where.",
        json_schema_extra={"x-quire-update": "hot", "x-quire-support": HONOURED},
    )
