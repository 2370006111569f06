"""The table of errors: status, type, code and headers as the contract with clients has them."""

from __future__ import annotations

import json

import pytest

from quire import errors
from quire.text import NoChatTemplate, ParamRefused, TemplateFailed, TemplateRefused
from quire_schemas.openai.answer import ErrorBody


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "headers"),
    [
        (errors.InvalidRequest("no", param="n"), 400, "invalid_request_error", None, {}),
        (errors.ContextLengthExceeded("no"), 400, "invalid_request_error", "context_length_exceeded", {}),
        (errors.HostRefused("no"), 421, "invalid_request_error", "host_not_allowed", {}),
        (errors.ModelNotFound("no"), 404, "invalid_request_error", "model_not_found", {}),
        (errors.MethodNotAllowed("no"), 405, "invalid_request_error", "method_not_allowed", {}),
        (errors.BodyTooLarge("no"), 413, "invalid_request_error", "request_too_large", {"connection": "close"}),
        (
            errors.QueueFull("no", retry_after=1.5),
            429,
            "rate_limit_exceeded",
            "queue_full",
            {"retry-after": "2", "retry-after-ms": "1500", "x-should-retry": "true"},
        ),
        (
            errors.MemoryShort("no", retry_after=1.0),
            429,
            "rate_limit_exceeded",
            "memory_short",
            {"retry-after": "1", "retry-after-ms": "1000", "x-should-retry": "true"},
        ),
        (
            errors.ServiceUnavailable("no", retry_after=400),
            503,
            "server_error",
            "service_unavailable",
            {"retry-after": "120", "retry-after-ms": "120000", "x-should-retry": "true"},
        ),
        (errors.ModelStopped("no"), 503, "server_error", "service_unavailable", {"x-should-retry": "false"}),
        (errors.EngineUnavailable("no"), 502, "server_error", "engine_unavailable", {"x-should-retry": "true"}),
        (errors.RequestQuarantined("no"), 502, "server_error", "request_quarantined", {"x-should-retry": "false"}),
        (errors.EngineDied("no"), 502, "server_error", "engine_died", {"x-should-retry": "true"}),
        (errors.TimedOut("no"), 504, "server_error", "timeout", {"x-should-retry": "false"}),
        (TemplateRefused("no"), 400, "invalid_request_error", "template_refused", {}),
        (TemplateFailed("no"), 400, "invalid_request_error", "template_failed", {}),
        (ParamRefused("no", param="n"), 400, "invalid_request_error", None, {}),
    ],
)
def test_the_contract(error: Exception, status: int, kind: str, code: str | None, headers: dict[str, str]) -> None:
    answer = errors.describe(error)
    body = ErrorBody.model_validate_json(answer.body).error
    assert (answer.status, body.type, body.code, body.message) == (status, kind, code, "no")
    assert body.param == (error.param if isinstance(error, errors.ApiError | ParamRefused) else None)
    sent = {name.decode(): value.decode() for name, value in answer.headers}
    assert sent.pop("content-type") == "application/json"
    assert sent.pop("content-length") == str(len(answer.body))
    assert sent == headers


def test_what_is_not_in_the_table_says_nothing_of_itself() -> None:
    answer = errors.describe(RuntimeError("/home/someone/secret 0x7f00 Traceback"))
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert json.loads(answer.body)["error"]["code"] == "internal_error"


def test_a_checkpoint_without_template_is_answered_with_the_remedy() -> None:
    assert b"chatTemplateFile" in errors.describe(NoChatTemplate("internal words")).body


def test_every_error_of_the_tree_has_a_row_and_a_code_of_its_own() -> None:
    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [sub for direct in kind.__subclasses__() for sub in (direct, *below(direct))]

    kinds = below(errors.ApiError)
    assert all(kind in errors.TABLE for kind in kinds)
    as_their_parents = (errors.ModelStopped, errors.OutOfTime)
    codes = [errors.TABLE[kind].code for kind in kinds if kind not in as_their_parents]
    assert len(set(codes)) == len(codes)


def test_a_subclass_is_answered_as_its_nearest_ancestor() -> None:
    class Special(errors.QueueFull):
        pass

    assert errors.describe(Special("x")).code == "queue_full"
