"""Kind `Gateway`: where clients connect. There is one, named `default`; without a manifest it has its defaults.

A change of `bind`, `port`, `workers`, `tls`, `metrics` or `telemetry` is `rolling`: another router takes over, on
the same listening socket or a new one. What is hot the running router takes, and no stream notices.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from quire_schemas.quantities import BadQuantity, Duration, Quantity, parse_duration, parse_quantity
from quire_schemas.resource import HONOURED, Resource, Strict, declared, section

DEFAULT_BIND = "127.0.0.1"
DEFAULT_PORT = 8000
MIN_BODY, MAX_BODY = 1 << 10, 1 << 30
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_HOST = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]{1,253}")
_URL = r"^https?://[A-Za-z0-9.:\[\]-]+(/[^\s?#]*)?$"


def _origin(text: str) -> str:
    """An origin as browsers send it: without the port that its scheme has anyhow."""
    found = _ORIGIN.fullmatch(text.lower())
    if text == "*" or (found is not None and int(found["port"] or 1) in range(1, 65536)):
        plain = text.lower().removesuffix(":80" if text.lower().startswith("http:") else ":443")
        return plain if found is not None else text
    raise BadQuantity(
        f"'{text}' is no origin", "give scheme, host and port alone, for example http://localhost:3000, or '*'"
    )


def _host(text: str) -> str:
    """A name as it stands in a Host header: an address of IPv6 in brackets."""
    plain = text.lower()
    if ":" in plain and not plain.startswith("["):
        plain = f"[{plain}]"
    if not _HOST.fullmatch(plain):
        raise BadQuantity(f"'{text}' is no host", "give a name or an address alone, for example llm.example.org")
    return plain


def _body_size(text: str) -> str:
    if not MIN_BODY <= parse_quantity(text) <= MAX_BODY:
        raise BadQuantity(f"'{text}' is below 1Ki or above 1Gi", "give a size between, for example '16Mi'")
    return text


def is_loopback(bind: str) -> bool:
    """Whether this machine alone can reach an address."""
    return bind == "localhost" or ipaddress.ip_address(bind).is_loopback


def is_every_address(bind: str) -> bool:
    """Whether it stands for all addresses of this machine, so that no request can name it."""
    return bind != "localhost" and ipaddress.ip_address(bind).is_unspecified


def _a_second_at_least(text: str) -> str:
    if parse_duration(text) < 1:
        raise BadQuantity(f"'{text}' is shorter than a second", "give 1s or more, for example '120s'")
    return text


class Tls(Strict):
    """Certificate of the listener. Files that are renewed in their place are taken within ten seconds."""

    cert_file: str = declared("PEM file with the certificate chain; an absolute path.", update="rolling")
    key_file: str = declared(
        "PEM file with the private key, without a password; an absolute path.", update="rolling"
    )


class Cors(Strict):
    """Which web pages may call the API."""

    allow_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], Field(strict=False)] = declared(
        "Origins that may call, such as https://chat.example.org or http://localhost:3000; '*' is any page. No "
        "cookies are taken from them.",
        (),
        update="hot",
        max_length=64,
    )


class ClientTimeouts(Strict):
    """How long the router waits for clients; who takes longer is cut off, and what ran for it is aborted."""

    head: Annotated[Duration, AfterValidator(_a_second_at_least)] = declared(
        "For a connection to bring the line and headers of a request, and before that for the handshake of TLS.",
        "10s",
        update="hot",
    )
    body: Annotated[Duration, AfterValidator(_a_second_at_least)] = declared(
        "For the whole body of a request; of a file that is uploaded, for each next piece.", "30s", update="hot"
    )
    send: Annotated[Duration, AfterValidator(_a_second_at_least)] = declared(
        "For a client to read on, once it has left so much of its answer unread that no more is kept for it.",
        "30s",
        update="hot",
    )
    idle: Annotated[Duration, AfterValidator(_a_second_at_least)] = declared(
        "That a connection without a request is kept open.", "75s", update="hot"
    )


class Telemetry(Strict):
    """Where the traces of requests go, and what is measured of them."""

    otlp_endpoint: Annotated[str, StringConstraints(pattern=_URL, max_length=1024)] | None = declared(
        "Base URL of an OTLP collector, such as http://localhost:4318; spans go to its /v1/traces over HTTP, "
        "metrics to its /v1/metrics. Without it the OTEL_* variables of the environment say where, else that same "
        "address.",
        None,
        update="rolling",
    )
    sampling: Literal["always", "errors", "never"] = declared(
        "Which requests are traced: all whose caller did not decide against it; of those, the ones that failed by "
        "no fault of the client; or none, whatever the environment says.",
        "always",
        update="rolling",
    )
    metrics: Literal["always", "never"] = declared(
        "Whether durations and tokens of requests go to the collector as metrics, too, for one that takes them. "
        "/metrics has them in any case.",
        "always",
        update="rolling",
    )


class Metrics(Strict):
    """How /metrics is spelled."""

    compat: Literal["none", "vllm"] = declared(
        "'vllm' adds what vLLM has, too, under the names and labels that dashboards made for it look for.",
        "none",
        update="rolling",
    )


class GatewaySpec(Strict):
    """The listener and what holds for all requests."""

    bind: Annotated[str, StringConstraints(min_length=1, max_length=255)] = declared(
        "Address to listen on. One that other machines can reach needs an AccessPolicy, and tls or "
        "insecurePlaintext; requests without a key are then refused, whatever policies there are.",
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
        "Processes of the router that take connections from the port, each with an interpreter of its own. "
        "Limits, queues, shares and choices of replicas hold over all of them.",
        1,
        update="rolling",
        ge=1,
        le=64,
    )
    tls: Tls | None = section(
        Tls, "Certificate of the listener, which then speaks https alone; without it HTTP.", optional=True
    )
    insecure_plaintext: bool = declared(
        "Let an address that other machines can reach speak HTTP, where everybody on the way can read keys and "
        "texts: for networks that encrypt by themselves, or behind a proxy that does.",
        False,
        update="hot",
    )
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], Field(strict=False)] = declared(
        "Names and addresses, without a port, that requests may have in their Host header besides those of "
        "loopback and bind.",
        (),
        update="hot",
        max_length=64,
    )
    cors: Cors | None = section(
        Cors,
        "Which web pages may call the API and read its answers. Without this section none can.",
        optional=True,
    )
    max_body_size: Annotated[Quantity, AfterValidator(_body_size)] = declared(
        "Largest request body, from 1Ki to 1Gi; what is above is answered with 413.", "4Mi", update="hot"
    )
    timeouts: ClientTimeouts = section(ClientTimeouts, "How long the router waits for clients.")
    telemetry: Telemetry | None = section(
        Telemetry,
        "Where the traces of requests go. Without this section the OTEL_* variables of the environment decide.",
        optional=True,
    )
    access_log: Literal["none", "errors", "all"] = declared(
        "Which requests have a line in the router's log, with ids, times and tokens and no text: none; those that "
        "failed by no fault of the client; or all. Probes and scrapes never have one.",
        "errors",
        update="hot",
    )
    metrics: Metrics = section(Metrics, "How /metrics is spelled.")
    unknown_fields: Literal["reject", "ignore"] = declared(
        "What happens to a request field that the API does not know: a 400 that names it, or nothing at all. A "
        "field that is known and not honoured is refused either way.",
        "reject",
        update="hot",
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
