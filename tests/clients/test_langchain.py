"""The `langchain-openai` package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr
from tests.clients.server import Server

WORDS = "naïve 你好 🦊🙂 — done"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>'


Ask = Callable[..., ChatOpenAI]


@pytest.fixture
def model(server: Server) -> Iterator[Ask]:
    """Makes the model of a name, over connections that are closed: those of its own are kept for ever."""
    with httpx.Client() as http:

        def make(name: str = "parrot", **options: Any) -> ChatOpenAI:
            key = SecretStr("none")
            return ChatOpenAI(
                model=name, base_url=server.url, api_key=key, max_retries=0, http_client=http, **options
            )

        yield make


class Verdict(BaseModel):
    """What the model is to fill in."""

    kind: Literal["question", "order", "greeting"]
    polite: bool


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_invoke_and_stream(model: Ask) -> None:
    parrot = model(extra_body={"script": WORDS}, stream_usage=True)
    answer = parrot.invoke("Say it")
    assert answer.content == WORDS
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(parrot.stream("Say it"))
    assert "".join(str(chunk.content) for chunk in chunks) == WORDS
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [answer.usage_metadata]


async def test_many_at_once(model: Ask) -> None:
    async with httpx.AsyncClient() as http:
        answers = await model(http_async_client=http).abatch(["one", "two", "three"])
    assert [answer.content for answer in answers] == ["one", "two", "three"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Ask, method: Literal["json_schema", "function_calling"]) -> None:
    tiny = model("tiny", temperature=0, max_completion_tokens=100, reasoning_effort="none")
    assert isinstance(tiny.with_structured_output(Verdict, method=method).invoke("Please sit down."), Verdict)


def test_embeddings(server: Server) -> None:
    with httpx.Client() as http:
        made = OpenAIEmbeddings(
            model="tiny",
            base_url=server.url,
            api_key=SecretStr("none"),
            http_client=http,
            check_embedding_ctx_length=False,  # true has it fetch the tokenizer of another model
        )
        assert len(made.embed_documents(["a", "b"])) == 2


def test_errors(model: Ask) -> None:
    with pytest.raises(openai.NotFoundError):
        model("third").invoke("Say it")


def test_tools_are_called_whole_and_as_a_stream(model: Ask) -> None:
    calling = model(extra_body={"script": CALL}).bind_tools([weather])
    answer = calling.invoke("How is the weather in Graz?")
    assert isinstance(answer, AIMessage)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Graz"})]
    whole: Any = None
    for chunk in calling.stream("How is the weather in Graz?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("weather", {"city": "Graz"})]
    [call] = answer.tool_calls
    told = [HumanMessage("?"), answer, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert model().invoke(told).content == "sunny in Graz"
