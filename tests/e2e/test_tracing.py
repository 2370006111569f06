"""One trace from the command to the token: the real command, control plane, router and engine, and a collector."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable

from tests.e2e.conftest import GATEWAY, Platform
from tests.integration.otlp_collector import Collector, Span

SHELL = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def named(service: str, name: str, **attributes: object) -> Callable[[list[Span]], Span | None]:
    """The first span of that service and name with these attributes (`_` for `.`)."""
    wanted = {key.replace("_", "."): value for key, value in attributes.items()}

    def found(spans: list[Span]) -> Span | None:
        mine = [span for span in spans if (span.service, span.name) == (service, name)]
        return next((span for span in mine if wanted.items() <= span.attributes.items()), None)

    return found


def ask(platform: Platform) -> None:
    body = {"model": "traced", "messages": [{"role": "user", "content": "CANARY-PROMPT"}], "max_tokens": 5}
    url = platform.json("get", "gateway/default")["status"]["endpoints"]["openai"] + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def test_an_apply_and_a_request_are_traced_through_every_process(platform: Platform) -> None:
    with Collector() as first, Collector() as second:
        platform.environment |= {**first.environment(), "TRACEPARENT": SHELL}
        platform.run("apply", platform.gateway, platform.model("traced"))

        command = first.wait(named("quire-cli", "platform apply"))
        assert (command.trace_id, command.parent_id) == (SHELL[3:35], SHELL[36:52])
        assert command.attributes["process.exit.code"] == 0
        admin = first.wait(named("quire-controlplane", "POST /v1/apply"))
        assert (admin.trace_id, admin.parent_id) == (command.trace_id, command.span_id)
        pass_ = first.wait(named("quire-controlplane", "reconcile model", quire_reconcile_outcome="acted"))
        assert pass_.attributes["quire.resource"] == "model/traced"
        assert pass_.attributes["quire.generation"] == 1
        assert pass_.links == [(admin.trace_id, admin.span_id)]
        assert pass_.parent_id == ""
        assert pass_.trace_id != admin.trace_id
        steps = [attributes["quire.reconcile.step"] for _, _, attributes in pass_.events]
        assert steps
        assert all("traced" in step for step in steps), steps

        ask(platform)
        request = first.wait(named("quire-router", "chat traced"))
        phases = {span.name: span for span in first.below(request)}
        assert list(phases) == ["tokenize", "queue", "prefill", "decode"]
        times = [at for span in phases.values() for at in (span.start, span.end)]
        assert [request.start, *times, request.end] == sorted([request.start, *times, request.end])
        assert phases["prefill"].end - phases["prefill"].start > 100_000, "a step of a model takes time"
        assert phases["decode"].attributes["quire.tokens"] == request.attributes["gen_ai.usage.output_tokens"]
        assert b"CANARY" not in b"".join(first.raw)

        telemetry = f"spec: {{port: 0, telemetry: {{otlpEndpoint: '{second.url}', sampling: always}}}}"
        declared = platform.write("telemetry.yaml", GATEWAY.replace("spec: {port: 0}", telemetry))
        platform.run("apply", declared)
        first.spans.clear()
        ask(platform)
        second.wait(named("quire-router", "chat traced"))
        assert named("quire-router", "chat traced")(first.spans) is None

        platform.run("delete", "model/traced")
        removal = first.wait(named("quire-controlplane", "DELETE /v1/objects/{kind}/{name}"))
        stop = first.wait(named("quire-controlplane", "reconcile model", quire_generation=2))
        assert stop.links == [(removal.trace_id, removal.span_id)]
