"""A scripted model as people who test their clients see it: the official client, a real router, a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.integration.engine_process import engine_running, without_weights
from tests.integration.router_world import ASK, TEXT, World

from quire import builtin
from quire.text import Tokenizer
from quire_schemas import wire

WORDS = "naïve 你好 🦊🙂 — done"


@pytest.fixture(scope="module")
def engine_spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wire.EngineSpec]:
    """A scripted engine, which has no weights to load."""
    checkpoint = str(without_weights(tmp_path_factory.mktemp("checkpoint")))
    with engine_running(model_dir=checkpoint, runner="scripted", step_time=0.003) as spec:
        yield spec


@pytest.fixture
async def scripted(world: World, engine_spec: wire.EngineSpec) -> World:
    """The router with the scripted engine as its replica."""
    await world.serve_process(engine_spec, scripted=True)
    return world


async def chat(client: openai.AsyncOpenAI, script: Any, **options: Any) -> tuple[str, str | None, Any, int]:
    """Text, finish reason and usage of a stream, and the number of its events that had text."""
    stream = await client.chat.completions.create(
        model="tiny",
        messages=ASK,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"script": script} if script is not None else {},
        **options,
    )
    chunks = [chunk async for chunk in stream]
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert not any("\ufffd" in piece for piece in pieces), "part of a character was sent"
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1]
    return "".join(pieces), finish, chunks[-1].usage, len(pieces)


async def test_scripts_are_streamed_exactly(scripted: World) -> None:
    tokenizer = Tokenizer.load(builtin.path("tiny"))
    ids = tokenizer.encode(WORDS, add_special_tokens=False)
    async with scripted.client() as client:
        text, finish, usage, pieces = await chat(client, WORDS)
        assert (text, finish) == (WORDS, "stop")
        assert pieces > 3, "it comes in pieces"
        assert usage.completion_tokens == len(ids) + 1, "the token that ended it counts"
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert (await chat(client, TEXT))[:2] == (TEXT, "stop")
        assert (await chat(client, ids))[:2] == (WORDS, "stop")
        assert (await chat(client, None))[:2] == ("Say it", "stop"), "without a script, what was said last"

        text, finish, usage, _ = await chat(client, WORDS, max_tokens=4)
        assert (text, finish, usage.completion_tokens) == (tokenizer.decode(ids[:4]).rstrip("\ufffd"), "length", 4)
        assert (await chat(client, WORDS, stop="好 🦊"))[:2] == (WORDS[: WORDS.index("好 🦊")], "stop")
        assert (await chat(client, ""))[:2] == ("", "stop")

        whole = await client.chat.completions.create(
            model="tiny", messages=ASK, n=2, logprobs=True, top_logprobs=1, extra_body={"script": WORDS}
        )
        assert [choice.message.content for choice in whole.choices] == [WORDS, WORDS]
        scores = whole.choices[0].logprobs
        assert scores is not None
        assert {entry.logprob for entry in scores.content or ()} == {0.0}

        echoed = await client.completions.create(model="tiny", prompt=["Hello, 你好", "b"], max_tokens=50)
        assert [choice.text for choice in echoed.choices] == ["Hello, 你好", "b"]
        told = await client.completions.create(
            model="tiny", prompt="a", max_tokens=50, extra_body={"script": "x" * 8, "ignore_eos": True}
        )
        assert told.choices[0].text.startswith("x" * 8)
        assert told.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"script": 5}, "'script' must be a string or a list of token ids."),
        ({"script": ["a"]}, "'script' must be a string or a list of token ids."),
        ({"script": [1, 2048]}, "'script' has a token id outside the vocabulary of 2048."),
        ({"script": "", "ignore_eos": True}, "'script' is empty, and the answer is not to end with it."),
    ],
)
async def test_scripts_that_cannot_be_followed_are_refused(
    scripted: World, body: dict[str, Any], message: str
) -> None:
    async with scripted.client() as client:
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(model="tiny", messages=ASK, extra_body=body)
    assert (error.value.param, error.value.body["message"]) == ("script", message)  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
async def test_what_would_have_to_change_a_script_is_refused(
    scripted: World, body: dict[str, Any], param: str
) -> None:
    async with scripted.client() as client:
        with pytest.raises(openai.BadRequestError, match="script") as error:
            await client.chat.completions.create(model="tiny", messages=ASK, extra_body=body)
    assert error.value.param == param


async def test_a_model_that_computes_refuses_scripts_by_name(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        for create in (
            lambda: client.chat.completions.create(model="tiny", messages=ASK, extra_body={"script": "a"}),
            lambda: client.completions.create(model="tiny", prompt="a", extra_body={"script": "a"}),
        ):
            with pytest.raises(openai.BadRequestError, match=r"spec\.engine\.runner is scripted") as error:
                await create()
            assert error.value.param == "script"
    assert not engine.generates
