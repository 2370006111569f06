"""Inputs of batches: where their lines are, and what is wrong with which; what becomes of an answer."""

from __future__ import annotations

import json
import time
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest

from quire.router import batch_input, lines
from quire.router.access import EVERYBODY, Visit
from quire.router.batch_input import Reading
from quire.router.batches import Plan
from quire.router.inside import InsideClient
from quire_schemas.openai.batches import MAX_ERRORS, BadLine, read_line
from quire_schemas.openai.completions import CompletionRequest, read_completion

ENDPOINT = "/v1/completions"


class Completions:
    """What of an endpoint's `Format` reading needs."""

    def read(self, body: bytes, ignore_unknown: bool) -> CompletionRequest:
        return read_completion(body, ignore_unknown)

    def sequences(self, request: CompletionRequest) -> int:
        return len(request.prompt) * request.sequences


def line(name: str, **body: Any) -> bytes:
    whole = {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": {"model": "m", "prompt": "x", **body}}
    return json.dumps(whole, ensure_ascii=False).encode()


def read(path: Path, content: bytes, max_body: int = 4096) -> Reading:
    path.write_bytes(content)
    form: Any = Completions()
    reading = Reading(path, ENDPOINT, form, max_body=max_body, ignore_unknown=False)
    while reading.go_on():
        pass
    reading.close()
    return reading


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_plan_says_where_each_line_is_and_what_it_takes(tmp_path: Path, end: bytes) -> None:
    lines = [line("a", n=2), b"", line("ü 你好", model="other", prompt=["x", "y"]), b"   ", line("c")]
    content = end.join(lines)  # the last line has no end
    reading = read(tmp_path / "in", content)
    assert reading.errors == []
    plan = reading.plan
    assert (plan.models, list(plan.of_model), list(plan.sequences)) == (["m", "other"], [0, 1, 0], [2, 2, 1])
    found = [content[at : at + length] for at, length in zip(plan.offsets, plan.lengths, strict=True)]
    assert [read_line(each, ENDPOINT)[0] for each in found] == ["a", "ü 你好", "c"]
    assert Plan.unpacked(plan.packed()) == plan


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    content = BOM_UTF8 + line("a") + b"\n" + line("b")
    reading = read(tmp_path / "in", content)
    assert reading.errors == []
    plan = reading.plan
    found = [content[at : at + length] for at, length in zip(plan.offsets, plan.lengths, strict=True)]
    assert [read_line(each, ENDPOINT)[0] for each in found] == ["a", "b"]
    assert read(tmp_path / "in", line("a")[:2]).errors


def test_lines_above_a_limit_are_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = line("long", prompt="x" * 5000)
    longer = line("longer", prompt="x" * 500_000)
    reading = read(tmp_path / "in", b"\n".join([line("a"), long, longer, line("b", temperature=9), line("b2")]))
    found = [(error["line"], error["code"], error["param"]) for error in reading.errors]
    assert found == [
        (2, "line_too_long", "body"), (3, "line_too_long", None), (4, "invalid_request", "body.temperature"),
    ]  # fmt: skip
    assert len(reading.plan) == 2
    monkeypatch.setattr(batch_input, "MAX_LINES", 3)
    reading = read(tmp_path / "in", b"\n".join(line(str(number)) for number in range(9)))
    assert [(error["line"], error["code"]) for error in reading.errors] == [(4, "too_many_lines")]


def test_a_file_that_is_none_is_not_read_to_its_end(tmp_path: Path) -> None:
    reading = read(tmp_path / "in", b"x\n" * 10_000)
    assert len(reading.errors) == MAX_ERRORS
    assert reading.errors[-1]["line"] == MAX_ERRORS
    assert [error["code"] for error in read(tmp_path / "in", b"").errors] == ["empty_file"]
    assert [error["code"] for error in read(tmp_path / "in", b"\n\n").errors] == ["empty_file"]


def test_others_have_their_turn_while_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(line(str(number)) for number in range(3000)))
    form: Any = Completions()
    reading = Reading(path, ENDPOINT, form, max_body=4096, ignore_unknown=False)
    moments = 0
    began = time.monotonic()
    while reading.go_on():
        moments += 1
    reading.close()
    assert moments >= (time.monotonic() - began) / (10 * batch_input.A_MOMENT)
    assert (len(reading.plan), moments > 5) == (3000, True)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "invalid_json_line"),
        (b"{}{}", "invalid_json_line"),
        (b'"text"', "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (b'{"custom_id": 1, "method": "POST", "url": "/v1/completions", "body": {}}', "invalid_custom_id"),
        (b'{"custom_id": null, "method": "POST", "url": "/v1/completions", "body": {}}', "invalid_custom_id"),
        (line("x" * 513), "invalid_custom_id"),
        (b'{"custom_id": "a", "method": ["POST"], "url": "/v1/completions", "body": {}}', "invalid_method"),
        (b"[" * 100_000, "invalid_json_line"),
    ],
)
def test_what_is_no_line(text: bytes, code: str) -> None:
    with pytest.raises(BadLine) as refused:
        read_line(text, ENDPOINT)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("status", "should_retry", "expected"),
    [
        (200, None, ["answer"]),
        (400, None, ["answer"]),
        (404, None, ["answer"]),
        (504, b"false", ["answer"]),
        (429, b"true", ["behind", "behind", "behind", "behind"]),
        (503, b"false", ["behind", "behind", "behind", "behind"]),
        (507, b"false", ["behind", "behind", "behind", "behind"]),
        (502, b"true", ["first", "first", "first", "first"]),
        (500, None, ["behind", "behind", "answer"]),
        (502, b"false", ["aside", "answer"]),
    ],
)
def test_which_answers_are_the_lines(status: int, should_retry: bytes | None, expected: list[str]) -> None:
    work = lines.Work(batch=None)  # type: ignore[arg-type]
    made: list[str] = []
    for _ in expected:
        client = InsideClient(ENDPOINT, b"", work.gone, Visit(EVERYBODY))
        client.status = status
        client.headers = {} if should_retry is None else {b"x-should-retry": should_retry}
        again = lines.again(work, 7, client)
        word = "answer" if again is None else "aside" if again.after else "first" if again.first else "behind"
        made.append(word)
    assert made == expected


def test_a_line_has_each_key_once() -> None:
    sound = line("a", prompt='{"url": 1, "url": 2}', logit_bias={})
    assert read_line(sound, ENDPOINT)[0] == "a"
    for twice in (
        sound.replace(b'"method": "POST"', b'"method": "POST", "method": "POST"'),
        sound.replace(b'"body": {', b'"body" : {"model": "n"}, "bod\\u0079":{'),
    ):
        assert twice != sound
        with pytest.raises(BadLine, match="twice") as told:
            read_line(twice, ENDPOINT)
        assert told.value.code == "invalid_json_line"
