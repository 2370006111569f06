"""The official OpenAI client against the example manifests, several models at once: from manifest to text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is PagedAttention?"}]


@pytest.fixture(scope="module")
def client(shared_platform: Platform) -> Iterator[openai.OpenAI]:
    platform = shared_platform
    examples = (platform.manifests / "quickstart.yaml", platform.manifests / "several.yaml")
    platform.run("apply", platform.gateway, *examples)
    with openai.OpenAI(base_url=platform.base_url("quickstart"), api_key="unused", max_retries=0) as client:
        yield client


def test_models_are_listed_by_name(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {
        "quickstart",
        "assistant",
        "default",
        "summaries",
        "drafts",
    }
    assert client.models.retrieve("drafts").object == "model"


def test_a_stream_gives_the_same_text_as_one_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="assistant", messages=QUESTION, temperature=0, max_tokens=60)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    text, finishes, usage = "", [], None
    with client.chat.completions.create(
        model="assistant",
        messages=QUESTION,
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for part in chunk.choices:
                text += part.delta.content or ""
                if part.finish_reason:
                    finishes.append(part.finish_reason)
    assert text == choice.message.content
    assert finishes == [choice.finish_reason]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_each_model_answers_by_its_names_and_an_unknown_one_is_404(client: openai.OpenAI) -> None:
    for name in ("quickstart", "default", "drafts"):
        answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=8)
        assert answer.model == name
        assert answer.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="third", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_n_choices_are_numbered_and_counted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="assistant", messages=QUESTION, n=3, seed=7, temperature=1.0, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 36
    assert answer.usage.completion_tokens > 12


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="assistant", messages=QUESTION, temperature=0, max_tokens=60)
    text = whole.choices[0].message.content or ""
    stop = text.split()[3]
    answer = client.chat.completions.create(
        model="assistant", messages=QUESTION, temperature=0, max_tokens=60, stop=[stop]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text[: text.index(stop)]


def test_completions_stream_and_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="summaries", prompt="The scheduler", temperature=0, max_tokens=16)
    assert whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16 or whole.choices[0].finish_reason == "stop"
    with client.completions.create(
        model="summaries", prompt="The scheduler", temperature=0, max_tokens=16, stream=True
    ) as stream:
        assert "".join(choice.text for chunk in stream for choice in chunk.choices) == whole.choices[0].text


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="assistant", messages=QUESTION, temperature=1.0, max_tokens=900, stream=True
    ) as stream:
        next(iter(stream))
    answer = client.chat.completions.create(model="assistant", messages=QUESTION, temperature=0, max_tokens=4)
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_a_bad_field_is_400_and_named(fields: dict[str, object], named: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="quickstart", messages=QUESTION, extra_body=fields)
    assert named in str(caught.value)
    assert client.models.list().data


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"model": "quickstart", "messages": [', "JSON"),
        (
            '{"model": "quickstart", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "temperature",
        ),
        ('{"model": "quickstart", "messages": "x"}', "messages"),
    ],
)
def test_a_body_that_no_client_library_sends_is_400(body: str, named: str, client: openai.OpenAI) -> None:
    answer = httpx.post(
        f"{client.base_url}chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]


def test_a_prompt_above_the_context_is_400(client: openai.OpenAI) -> None:
    long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "block " * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="drafts", messages=long)
    assert caught.value.code == "context_length_exceeded"
