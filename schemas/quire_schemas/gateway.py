"""Kind `Gateway`: where clients connect. There is one, named `default`; without a manifest it has its defaults.

A change of `bind` or `port` is `rolling`: the router is replaced behind the same or a new listening socket.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from quire_schemas.quantities import BadQuantity, Duration, Quantity, parse_duration
from quire_schemas.resource import HONOURED, Resource, Strict, declared, section

DEFAULT_BIND = "127.0.0.1"
DEFAULT_PORT = 8000
_NO_TLS = "the API is plain HTTP on loopback"
_NO_CORS = "there are no CORS headers yet"
_URL = r"^https?://[A-Za-z0-9.:\[\]-]+(/[^\s?#]*)?$"


class Tls(Strict):
    """Certificate of the listener."""

    cert_file: str = declared("PEM file with the certificate chain.", update="rolling", refused=_NO_TLS)
    key_file: str = declared("PEM file with the private key.", update="rolling", refused=_NO_TLS)


class Cors(Strict):
    """Which web pages may call the API."""

    allow_origins: Annotated[tuple[str, ...], Field(strict=False)] = declared(
        "Origins that may call, such as https://chat.example.org.", (), update="rolling", refused=_NO_CORS
    )


class Telemetry(Strict):
    """Where the traces of requests go."""

    otlp_endpoint: Annotated[str, StringConstraints(pattern=_URL, max_length=1024)] | None = declared(
        "Base URL of an OTLP collector, such as http://localhost:4318; spans go to its /v1/traces over HTTP. "
        "Without it the OTEL_* variables of the environment say where, else that same address.",
        None,
        update="rolling",
    )
    sampling: Literal["always", "errors", "never"] = declared(
        "Which requests are traced: all whose caller did not decide against it; of those, the ones that failed by "
        "no fault of the client; or none, whatever the environment says.",
        "always",
        update="rolling",
    )


class Metrics(Strict):
    """How /metrics is spelled."""

    compat: Literal["none", "vllm"] = declared(
        "'vllm' adds every metric under the name that dashboards made for vLLM look for.",
        "none",
        update="rolling",
        refused="metrics have the names of this product alone",
        honours=("none",),
    )


def _a_second_at_least(text: str) -> str:
    if parse_duration(text) < 1:
        raise BadQuantity(f"'{text}' is shorter than a second", "give 1s or more, for example '120s'")
    return text


class GatewaySpec(Strict):
    """The listener and what holds for all requests."""

    bind: Annotated[str, StringConstraints(min_length=1, max_length=255)] = declared(
        "Address to listen on. Only loopback addresses (127.0.0.1, ::1) are taken as long as there are no access "
        "policies to protect others.",
        DEFAULT_BIND,
        update="rolling",
    )
    port: int = declared(
        "TCP port to listen on; 0 takes any free one, and the same again later if it is free then.",
        DEFAULT_PORT,
        update="rolling",
        ge=0,
        le=65535,
    )
    workers: int = declared(
        "Router processes.",
        1,
        update="rolling",
        refused="there is one router process",
        honours=(1,),
        ge=1,
        le=64,
    )
    tls: Tls | None = section(Tls, "Certificate of the listener.", refused=_NO_TLS, optional=True)
    cors: Cors | None = section(Cors, "Which web pages may call the API.", refused=_NO_CORS, optional=True)
    max_body_size: Quantity = declared(
        "Largest request body.",
        "4Mi",
        update="rolling",
        refused="the limit is fixed",
        honours=("4Mi",),
    )
    telemetry: Telemetry | None = section(
        Telemetry,
        "Where the traces of requests go. Without this section the OTEL_* variables of the environment decide.",
        optional=True,
    )
    metrics: Metrics = section(Metrics, "How /metrics is spelled.")
    unknown_fields: Literal["reject", "ignore"] = declared(
        "What happens to a request field that the API does not know.",
        "reject",
        update="hot",
        refused="unknown request fields are answered with 400",
        honours=("reject",),
    )
    adoption_window: Annotated[Duration, AfterValidator(_a_second_at_least)] = declared(
        "How long engines live on when neither a router nor a control plane is there; then they finish what they "
        "compute and exit. An engine keeps the window that it was started with. At least 1s.",
        "120s",
        update="hot",
    )


class Gateway(Resource):
    """Where clients connect."""

    kind: Literal["Gateway"] = declared("Which kind of object this is.", update="immutable")
    spec: GatewaySpec = Field(
        GatewaySpec(),
        description="The listener and what holds for all requests.",
        json_schema_extra={"x-quire-update": "rolling", "x-quire-support": HONOURED},
    )
