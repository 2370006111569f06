"""The access log: one line a request, that no request can make two, and that says nothing a client wrote."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.router.account import Account, is_logged
from quire_schemas.wire import AccessLogged


def test_a_line_has_what_applies_in_a_fixed_order() -> None:
    account = Account(
        request_id="req_1",
        method="POST",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        route="/v1/chat/completions",
        operation="chat",
        model="m",
        replica="m-0",
        status=200,
        finish="stop",
        stream=True,
        prompt_tokens=21,
        cached_tokens=0,
        completion_tokens=9,
        queue=0.0002,
        first_token=0.0415,
        total=0.18031,
    )
    assert account.line() == (
        "request=req_1 trace=0af7651916cd43dd8448eb211c80319c method=POST route=/v1/chat/completions "
        "operation=chat model=m replica=m-0 status=200 finish=stop stream=true prompt_tokens=21 cached_tokens=0 "
        "completion_tokens=9 queue_ms=0.2 ttft_ms=41.5 total_ms=180.3"
    )
    assert Account(request_id="r", client="gone", finish="abort").line() == "request=r finish=abort client=gone"


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_a_value_holds_the_line_stays_one_and_is_read_back(text: str) -> None:
    line = Account(request_id="r", model=text, status=200).line()
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    words = shlex.split(line)
    assert words[0] == "request=r"
    assert words[-1] == "status=200"
    assert len(words) == 2 + bool(text), "no value reaches the next"


@pytest.mark.parametrize(
    ("account", "errors", "everything"),
    [
        (Account(status=200), False, True),
        (Account(status=404, error="model_not_found"), False, True),
        (Account(status=429, error="queue_full"), False, True),
        (Account(status=503), True, True),
        (Account(status=200, error="engine_died", failed=True), True, True),
        (Account(client="gone"), False, True),
        (Account(status=503, route="/health"), False, False),
        (Account(status=200, route="/metrics"), False, False),
    ],
)
def test_which_requests_have_a_line(account: Account, errors: bool, everything: bool) -> None:
    expected: dict[AccessLogged, bool] = {"none": False, "errors": errors, "all": everything}
    assert {which: is_logged(account, which) for which in expected} == expected
