"""What the router answers: text, streams, log-probabilities, models by their names."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import ASK, CHAT, TEXT, World, big, events, eventually
from tests.unit.platform import tokenizers_for_tests as made

from quire import builtin
from quire.text import Tokenizer
from quire_schemas import signals, wire
from quire_schemas.openai.chat import ChatChunk, ChatDelta


async def test_a_chat_whole_and_streamed_say_the_same(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASK)
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(engine.generates[0].token_ids)
    assert whole.usage.completion_tokens == len(world.tokenizer.encode(TEXT)) + 1  # the token that ended it counts
    sent = world.tokenizer.decode(engine.generates[0].token_ids, skip_special_tokens=False)
    assert sent == "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n"
    assert engine.generates[0].sampling.max_tokens == 512 - whole.usage.prompt_tokens


async def test_the_events_of_a_chat_stream_have_their_shape_and_order(world: World) -> None:
    await world.serve(await world.engine())
    body = {"model": "tiny", "messages": ASK, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    got = events(await world.raw(world.post("/v1/chat/completions", json.dumps(body).encode())))
    assert got.pop() == "DONE"
    chunks = [ChatChunk.model_validate(event) for event in got]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(c.delta.role is None and c.delta.content and c.finish_reason is None for c in mine[1:-1])
        assert (mine[-1].delta, mine[-1].finish_reason) == (ChatDelta(), "stop")
        assert "".join(c.delta.content or "" for c in mine) == TEXT
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks[:-1])
    assert all(event["usage"] is None for event in got[:-1])


async def test_running_usage_grows_in_every_chunk(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            stream=True,
            max_tokens=5,
            extra_body={"stream_options": {"continuous_usage_stats": True}},
        )
        usages = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert usages == sorted(usages)
    assert usages[-1] == 5


async def test_completions_of_several_prompts(world: World) -> None:
    engine = await world.engine(text="one two three")
    await world.serve(engine)
    ids = world.tokenizer.encode("Hello")
    async with world.client() as client:
        texts = await client.completions.create(model="tiny", prompt=["Hello", "Other"], n=2, max_tokens=100)
        by_ids = await client.completions.create(model="tiny", prompt=ids, echo=True)
        stream = await client.completions.create(model="tiny", prompt=[ids], echo=True, stream=True)
        parts = [chunk async for chunk in stream]
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in texts.choices} == {"one two three"}
    assert by_ids.choices[0].text == "Helloone two three"
    assert "".join(part.choices[0].text for part in parts) == "Helloone two three"
    assert [part.choices[0].finish_reason for part in parts][-1] == "stop"
    assert engine.generates[0].token_ids == engine.generates[4].token_ids == ids
    assert {request.sampling.max_tokens for request in engine.generates[4:]} == {16}


async def test_length_is_reported_as_such(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_a_stop_string_is_cut_and_the_engine_told(world: World) -> None:
    engine = await world.engine(tokens_per_step=2)
    await world.serve(engine)
    expected = TEXT[: TEXT.index("fox jum") if "fox jum" in TEXT else TEXT.index("café, 你")]
    stop = "café, 你"
    async with world.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASK, stop=[stop, "never"])
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stop=stop, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream]
        kept = await client.chat.completions.create(
            model="tiny", messages=ASK, stop=stop, extra_body={"include_stop_str_in_output": True}
        )
    assert whole.choices[0].message.content == "".join(pieces) == expected
    assert kept.choices[0].message.content == expected + stop
    assert whole.choices[0].finish_reason == "stop"

    async def told() -> bool:
        return len(engine.aborts) == 3 and not engine.running

    await eventually(told)


async def test_logprobs_line_up_with_the_text_and_stop_where_it_stops(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=2, stop="fox"
        )
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=2, stop="fox", stream=True
        )
        chunks = [chunk async for chunk in stream]
        plain = await client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=4)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    joined = b"".join(bytes(token.bytes or []) for token in found.content).decode()
    assert answer.choices[0].message.content == "The quick brown "
    assert joined.startswith("The quick brown")
    assert "fox" not in joined
    assert all(len(token.top_logprobs) == 2 and token.logprob == -0.5 for token in found.content)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert streamed == found.content
    scores = plain.choices[0].logprobs
    assert scores is not None
    assert scores.text_offset is not None
    assert len(scores.tokens or []) == 4
    assert [
        plain.choices[0].text[at:][: len(t)] for at, t in zip(scores.text_offset, scores.tokens or [], strict=True)
    ] == (scores.tokens)


async def test_sampling_reaches_the_engine_as_asked(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            n=2,
            temperature=0.7,
            top_p=0.9,
            seed=5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"7": -100, "8": 3},
            max_tokens=4,
            user="somebody",
            extra_body={
                "top_k": -1,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "stop_token_ids": [3],
                "min_tokens": 2,
                "ignore_eos": True,
            },
        )
    first, second = (request.sampling for request in engine.generates)
    assert first == wire.Sampling(
        max_tokens=4,
        min_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=5,
        stop_token_ids=(3,),
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={7: -100.0, 8: 3.0},
    )
    assert second.seed == 6


async def test_the_checkpoints_advice_is_the_default_of_sampling(world: World) -> None:
    made.write(world.folder / "advised", made.byte_level(), generation={"temperature": 0.6, "top_k": 20})
    engine = await world.engine()
    await world.serve(engine, tokenizer_dir=str(world.folder / "advised"))
    async with world.client() as client:
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1)
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1, temperature=0)
    assert [(r.sampling.temperature, r.sampling.top_k) for r in engine.generates] == [(0.6, 20), (0.0, 20)]


async def test_models_by_every_name(world: World) -> None:
    await world.table(world.route())
    async with world.client() as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny", "tiny"]
        card = await client.models.retrieve("org/tiny")
        assert (card.id, card.owned_by, card.created) == ("org/tiny", "quire", 1_700_000_000)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_two_models_are_routed_by_name(world: World) -> None:
    one, two = await world.engine("one", "from one"), await world.engine("two", "from two")
    await world.table(
        world.route(one.endpoint(), model="one", names=("one",)),
        world.route(two.endpoint(), model="two", names=("two",)),
    )
    async with world.client() as client:
        for name in ("one", "two"):
            answer = await client.chat.completions.create(model=name, messages=ASK)
            assert (answer.choices[0].message.content, answer.model) == (f"from {name}", name)


@pytest.fixture
def real_engine() -> Iterator[wire.EngineSpec]:
    """The built-in model in an engine process."""
    with engine_running(replica_id="real", num_blocks=64, max_num_batched_tokens=128) as spec:
        yield spec


async def test_the_built_in_model_answers_through_a_real_engine(
    world: World, real_engine: wire.EngineSpec
) -> None:
    await world.serve_process(real_engine)
    async with world.client() as client:
        plain: Any = {"model": "tiny", "messages": ASK, "max_tokens": 24}
        whole = await client.chat.completions.create(**plain)
        chunks = [chunk async for chunk in await client.chat.completions.create(**plain, stream=True)]
        many = await asyncio.gather(*(client.chat.completions.create(**plain) for _ in range(6)))
        seeded = [
            await client.chat.completions.create(
                **plain, n=2, temperature=1.5, seed=7, logprobs=True, top_logprobs=3
            )
            for _ in range(2)
        ]
        ids = Tokenizer.load(builtin.path("tiny")).encode("The", add_special_tokens=False)
        by_ids = await client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
        by_text = await client.completions.create(model="tiny", prompt="The", max_tokens=8, temperature=0)
        begun = await client.chat.completions.create(
            **{**plain, "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(begun))
        await begun.close()
    answer = whole.choices[0].message.content
    assert answer
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert {one.choices[0].message.content for one in many} == {answer}, "alone and in a batch"
    assert [c.message.content for c in seeded[0].choices] == [c.message.content for c in seeded[1].choices]
    first = seeded[0].choices[0]
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    assert (
        b"".join(bytes(t.bytes or []) for t in first.logprobs.content).decode("utf-8", "replace")
        == first.message.content
    )
    assert all(len(t.top_logprobs) == 3 for t in first.logprobs.content)
    assert by_ids.choices[0].text == by_text.choices[0].text

    async def idle() -> bool:
        found = await world.metrics()
        labels = '{model="tiny",replica="real"}'
        return found[signals.NUM_REQUESTS_RUNNING + labels] == 0 and found[signals.KV_CACHE_USAGE + labels] == 0

    await eventually(idle)


async def test_the_clients_trace_reaches_the_engine(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await http.post(f"{world.url}/v1/chat/completions", json=CHAT, headers={"traceparent": trace})
    assert engine.generates[0].trace == trace


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "million": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "million"],
    "additionalProperties": False,
}


async def test_answers_of_a_real_engine_have_the_structure_that_was_asked_for(
    world: World, real_engine: wire.EngineSpec
) -> None:
    await world.serve_process(real_engine)
    plain: Any = {
        "model": "tiny",
        "messages": ASK,
        "max_tokens": 120,
        "temperature": 0,
        "reasoning_effort": "none",
    }
    asked: dict[str, Any] = {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": CITY, "strict": True},
    }
    async with world.client() as client:

        async def told(**body: Any) -> str:
            answer = await client.chat.completions.create(**plain, extra_body=body)
            assert answer.choices[0].finish_reason == "stop"
            return answer.choices[0].message.content or ""

        city = json.loads(await told(response_format=asked))
        assert sorted(city) == ["city", "million"]
        compact = await told(structured_outputs={"json": CITY, "disable_any_whitespace": True})
        assert compact == json.dumps(json.loads(compact), separators=(",", ":"), ensure_ascii=False)
        assert await told(structured_outputs={"choice": ["tea", "coffee"]}) in ("tea", "coffee")
        assert re.fullmatch("[0-9]{3}-[a-f]", await told(structured_outputs={"regex": "[0-9]{3}-[a-f]"}))
        assert await told(structured_outputs={"grammar": 'start: "a" b b\nb: "b"'}) == "abb"
        stream = await client.chat.completions.create(
            **plain, stream=True, n=2, extra_body={"structured_outputs": {"regex": "x{40}"}}
        )
        texts = {0: "", 1: ""}
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == {0: "x" * 40, 1: "x" * 40}
        completion = await client.completions.create(
            model="tiny", prompt="Say", max_tokens=9, extra_body={"structured_outputs": {"choice": ["yes"]}}
        )
        assert completion.choices[0].text == "yes"
        for body, param, words in (
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
                "response_format.json_schema.schema",
                'not supported in a schema: "not"',
            ),
            ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
            ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown name"),
        ):
            for streamed in (False, True):
                with pytest.raises(openai.BadRequestError) as refusal:
                    await client.chat.completions.create(**plain, stream=streamed, extra_body=body)
                assert refusal.value.param == param
                assert words in refusal.value.message


async def test_what_a_step_brings_is_one_write(world: World) -> None:
    """Four choices, three tokens each: one piece of the body, sent at once, has the events of all."""
    engine = await world.engine(pace=0.02, tokens_per_step=3)
    await world.serve(engine)
    before = engine.steps
    with socket.create_connection(("127.0.0.1", world.port), 10) as link:
        link.sendall(world.post("/v1/chat/completions", big(stream=True, n=4, max_tokens=60)))
        answer = await asyncio.to_thread(_whole, link)
        (segments,) = struct.unpack_from(
            "I", link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), _DATA_SEGS_IN
        )
    steps = engine.steps - before
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    pieces = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(rest[:length])
        body = rest[length + 2 :]
    assert steps >= 20
    assert sum(piece.count(b"data: {") for piece in pieces) >= 4 * steps, "an event of each choice in each step"
    assert len(pieces) <= steps + 2, "and the end, which is [DONE] and the empty piece"
    assert segments <= len(pieces) + 1, "each goes out by itself, as a whole"


_DATA_SEGS_IN = 152
"""Where struct tcp_info counts the segments that came with data. Sockets of the router do not wait to fill one."""


def _whole(link: socket.socket) -> bytes:
    answer = b""
    while piece := link.recv(65536):
        answer += piece
    return answer
