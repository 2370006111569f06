"""The `openai` package: every family of calls, typed errors, and what becomes of streams that are cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel
from tests.clients.server import ENDLESS, FREED, PLACES, Server
from tests.effort import times

SAY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say it"}]
WORDS = "naïve 你好 🦊🙂 — done"


def script(text: str) -> dict[str, Any]:
    return {"script": text}


def test_a_chat_whole_and_as_a_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=SAY, temperature=0, max_tokens=40)
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")
    with client.chat.completions.create(
        model="tiny",
        messages=SAY,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_gathers_what_a_whole_answer_says(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="parrot", messages=SAY, extra_body=script(WORDS)) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == WORDS
    assert len(pieces) > 3


async def test_the_asynchronous_client_has_many_streams_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        streams = [
            await client.chat.completions.create(
                model="parrot", messages=SAY, stream=True, extra_body=script(f"{number} {WORDS}")
            )
            for number in range(4)
        ]
        texts = ["".join([chunk.choices[0].delta.content or "" async for chunk in stream]) for stream in streams]
    assert texts == [f"{number} {WORDS}" for number in range(4)]


def test_completions_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "The scheduler", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked)
    with client.completions.create(**asked, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text != ""
    several = client.completions.create(model="parrot", prompt=["a b", WORDS], max_tokens=50)
    assert [choice.text for choice in several.choices] == ["a b", WORDS]


def test_embeddings_in_base64_are_those_in_numbers(client: openai.OpenAI) -> None:
    texts = ["one text", "and another"]
    packed = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 and unpacks it
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1.0, abs=1e-4)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert {"tiny", "parrot"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("parrot").owned_by == "quire"


class Verdict(BaseModel):
    """What the model is to fill in."""

    kind: Literal["question", "order", "greeting"]
    polite: bool


def test_structured_output_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=SAY, temperature=0, max_tokens=100, reasoning_effort="none", response_format=Verdict
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(
        model="tiny", messages=SAY, temperature=0, max_tokens=100, reasoning_effort="none", response_format=Verdict
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_bad_requests_are_typed_and_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=SAY, temperature=9)
    assert (caught.value.status_code, caught.value.param) == (400, "temperature")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "block " * 900}])
    assert caught.value.code == "context_length_exceeded"


def test_what_is_not_there_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="third", messages=SAY)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("third")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a fox", model="tiny")
    assert caught.value.code == "endpoint_not_served"


def test_a_request_with_too_little_time_is_a_504_that_is_not_tried_again(server: Server) -> None:
    sent: list[httpx.Request] = []
    counting = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    with (
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=3, http_client=counting) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="parrot", messages=SAY, extra_body={**ENDLESS, "timeout": 0.1})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert len(sent) == 1, "x-should-retry is obeyed"


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()


@contextmanager
def crowded(client: openai.OpenAI) -> Iterator[openai.Stream[Any]]:
    """A stream that takes all places of `parrot`."""
    with client.chat.completions.create(
        model="parrot", messages=SAY, n=PLACES, stream=True, extra_body=ENDLESS
    ) as stream:
        next(iter(stream))
        yield stream


def test_a_crowd_is_a_rate_limit_and_its_headers_are_obeyed(client: openai.OpenAI, server: Server) -> None:
    with crowded(client), pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="parrot", messages=SAY)
    assert caught.value.code == "queue_full"
    asked = float(caught.value.response.headers["retry-after-ms"]) / 1000
    assert caught.value.response.headers["x-should-retry"] == "true"

    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=5) as patient, crowded(client) as stream:
        threading.Timer(0.2, stream.close).start()
        begun = time.monotonic()
        answer = patient.chat.completions.with_raw_response.create(
            model="parrot", messages=SAY, extra_body=script("at last")
        )
        waited = time.monotonic() - begun
    assert answer.parse().choices[0].message.content == "at last"
    assert answer.retries_taken >= 1
    assert waited >= asked * answer.retries_taken, "it comes back when it was told to"


def test_leaving_a_stream_frees_the_engine(client: openai.OpenAI, server: Server) -> None:
    for _ in range(times(1, 50)):
        with client.chat.completions.create(
            model="parrot", messages=SAY, stream=True, extra_body=ENDLESS
        ) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
        assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED


def test_a_client_that_waits_no_longer_frees_the_engine(client: openai.OpenAI, server: Server) -> None:
    for _ in range(times(1, 50)):
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="parrot", messages=SAY, timeout=0.2, extra_body=ENDLESS)
        assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED
