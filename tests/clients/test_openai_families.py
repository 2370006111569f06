"""The `openai` package: tools, reasoning, the Responses API, files and batches."""

from __future__ import annotations

import json
import time
from typing import Any, Final, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.clients.server import ENDLESS, FREED, Server

SAY: Final[list[Any]] = [{"role": "user", "content": "Say it"}]
WORDS: Final = "naïve 你好 🦊🙂 — done"
WEATHER: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"city": {"enum": ["Graz", "Wien"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"utc": {"type": "boolean"}},
    "required": ["utc"],
    "additionalProperties": False,
}
TOOLS: Final[list[Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK}},
]


def call(name: str, **arguments: Any) -> str:
    """A tool call as the built-in model's template has it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def called(message: Any) -> list[tuple[str, Any]]:
    return [(each.function.name, json.loads(each.function.arguments)) for each in message.tool_calls or ()]


BOTH: Final = call("weather", city="Graz") + "\n" + call("clock", utc=True)


def test_tool_calls_whole_and_as_a_stream_are_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "parrot", "messages": SAY, "tools": TOOLS, "extra_body": {"script": BOTH}}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert called(whole.message) == [("weather", {"city": "Graz"}), ("clock", {"utc": True})]
    ids = [each.id for each in whole.message.tool_calls or ()]
    assert len(set(ids)) == 2
    with client.chat.completions.stream(**asked) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        streamed = stream.get_final_completion().choices[0]
    assert called(streamed.message) == called(whole.message)
    assert streamed.finish_reason == "tool_calls"
    assert {event.index for event in pieces} == {0, 1}


def test_the_answer_of_a_tool_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    asked = client.chat.completions.create(
        model="parrot", messages=SAY, tools=TOOLS, extra_body={"script": call("clock", utc=False)}
    ).choices[0]
    [made] = list(asked.message.tool_calls or ())
    messages = [*SAY, asked.message, {"role": "tool", "tool_call_id": made.id, "content": "noon"}]
    answer = client.chat.completions.create(model="parrot", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "noon"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_a_tool_that_has_to_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=SAY, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=120
    )
    [(name, arguments)] = called(answer.choices[0].message)
    assert name in (["weather", "clock"] if choice == "required" else ["clock"])
    assert set(arguments) == ({"city"} if name == "weather" else {"utc"})


def test_what_a_strict_tool_asks_for_in_vain_is_refused_with_its_name(client: openai.OpenAI) -> None:
    odd = {**CLOCK, "properties": {"utc": {"type": "array", "uniqueItems": True}}}
    strict = {"type": "function", "function": {"name": "calendar", "strict": True, "parameters": odd}}
    with pytest.raises(openai.BadRequestError, match=r"uniqueItems.* strict ones: calendar\.") as refused:
        client.chat.completions.create(model="tiny", messages=SAY, tools=[*TOOLS, strict])  # type: ignore[list-item]
    assert refused.value.param == "tools"


def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="parrot", messages=SAY, tools=TOOLS, tool_choice="none", extra_body={"script": WORDS}
    )
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (WORDS, None)
    one = client.chat.completions.create(
        model="tiny", messages=SAY, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=120,
    )  # fmt: skip
    assert len(one.choices[0].message.tool_calls or ()) == 1


def test_thoughts_are_apart_from_the_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "parrot",
        "messages": SAY,
        "extra_body": {"script": f"<think>\nHm, hm.\n</think>\n\n{WORDS}"},
    }
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content == WORDS
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    assert str(thought).strip() == "Hm, hm."
    with client.chat.completions.create(**asked, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == WORDS


def test_a_response_is_made_streamed_kept_and_deleted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "parrot", "input": "Say it", "extra_body": {"script": WORDS}}
    made = client.responses.create(**asked)
    assert (made.output_text, made.status) == (WORDS, "completed")
    assert made.usage is not None
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == WORDS
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert client.responses.retrieve(made.id).output_text == WORDS
    after = client.responses.create(
        model="parrot", input="And then?", previous_response_id=made.id, extra_body={"script": "Nothing."}
    )
    assert (after.output_text, after.previous_response_id) == ("Nothing.", made.id)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_what_else_a_kept_response_may_tell_is_asked_for_in_a_list(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="parrot", input="Say it", include=["message.output_text.logprobs"], extra_body={"script": WORDS}
    )
    again = client.responses.retrieve(made.id, include=["message.output_text.logprobs"])
    assert again.output == made.output
    items = client.responses.input_items.list(
        made.id, include=["message.output_text.logprobs", "reasoning.encrypted_content"]
    )
    assert [item.type for item in items] == ["message"]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Graz", "Wien"]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, of what it sends
def test_what_helpers_of_chats_parsed_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": SAY, "max_tokens": 100, "temperature": 0, "reasoning_effort": "none",
    }  # fmt: skip
    parsed = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
    assert isinstance(parsed.parsed, Weather)
    with client.chat.completions.stream(**asked) as stream:
        plain = stream.get_final_completion().choices[0].message
    tool = openai.pydantic_function_tool(Weather)
    called: Any = (
        client.chat.completions.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False)
        .choices[0]
        .message
    )
    [made] = called.tool_calls
    assert isinstance(made.function.parsed_arguments, Weather)
    messages: list[Any] = [
        *SAY, parsed, *SAY, plain, *SAY, called, {"role": "tool", "tool_call_id": made.id, "content": "sunny"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="parrot", messages=messages, extra_body={"script": "I see."})
    assert answer.choices[0].message.content == "I see."


def test_what_helpers_of_responses_parsed_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "Say it", "temperature": 0, "reasoning": {"effort": "none"}}
    parsed = client.responses.parse(**asked, text_format=Weather, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Weather)
    tool: Any = {"type": "function", **openai.pydantic_function_tool(Weather)["function"]}
    with client.responses.stream(**asked, tools=[tool], tool_choice="required") as stream:
        called: Any = stream.get_final_response()
    [made] = [item for item in called.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}
    told: Any = [*parsed.output, *called.output, output]
    answer = client.responses.create(model="parrot", input=told, extra_body={"script": "I see."})
    assert answer.output_text == "I see."


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI, server: Server) -> None:
    script = {name: value for name, value in ENDLESS.items() if name != "max_tokens"}
    made = client.responses.create(
        model="parrot", input="Say it", background=True, max_output_tokens=ENDLESS["max_tokens"], extra_body=script
    )
    assert made.status in ("queued", "in_progress")
    assert client.responses.cancel(made.id).status == "cancelled"
    assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    text = b'{"a": 1}\n'
    made = client.files.create(file=("lines.jsonl", text), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(text), "lines.jsonl", "batch")
    assert made.id in {each.id for each in client.files.list()}
    assert client.files.content(made.id).content == text
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_batch_of_chats_is_answered(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "parrot", "messages": SAY, "script": f"{number} {WORDS}"},
        }
        for number in range(3)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    source = client.files.create(file=("in.jsonl", text), purpose="batch")
    batch = client.batches.create(
        input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.output_file_id is not None
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    said = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in answers}
    assert said == {f"r{number}": f"{number} {WORDS}" for number in range(3)}
