"""What requests may ask of sampling and of what is reported, from HTTP to token: the official client, the router
as a process, the built-in model in an engine process.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World
from tests.integration.wire_engine import WireEngine

from quire import builtin
from quire.text import Tokenizer
from quire_schemas import wire
from quire_schemas.openai.chat import ChatChunk, ChatCompletion
from quire_schemas.openai.completions import Completion

SUM: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
ASK: list[Any] = [{"role": "user", "content": "What is PagedAttention?"}]
TEXT = "The scheduler gives each request a share of the step."
THINK, UNTHINK, END = 2042, 2043, 2041


@pytest.fixture(scope="module")
def engine_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="sampling", num_blocks=64, max_num_batched_tokens=128) as spec:
        yield spec


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(builtin.path("tiny"))


@pytest.fixture
async def client(world: World, engine_spec: wire.EngineSpec) -> AsyncIterator[openai.AsyncOpenAI]:
    await world.serve_process(engine_spec)
    async with world.client() as client:
        yield client


def extra(answer: Any, name: str) -> Any:
    """A field that the official client's types do not have."""
    return answer.model_extra[name]


async def test_what_was_generated_scores_the_same_as_a_prompt(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)
    plain: dict[str, Any] = {"model": "tiny", "temperature": 0, "logprobs": 3}
    said = await client.completions.create(
        **plain, prompt=ids, max_tokens=6, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    choice = said.choices[0]
    assert choice.logprobs is not None
    drawn = extra(choice, "token_ids")
    assert len(drawn) == 6 == len(choice.logprobs.tokens or [])
    for begin, token in zip(choice.logprobs.text_offset or [], choice.logprobs.tokens or [], strict=True):
        assert choice.text[begin:].startswith(token)
    assert extra(choice, "prompt_token_ids") == ids
    again = await client.completions.create(
        **plain, prompt=[*ids, *drawn], echo=True, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    echoed = again.choices[0].logprobs
    assert echoed is not None
    assert again.choices[0].text.startswith(TEXT + choice.text)
    values, top, offsets = echoed.token_logprobs or [], echoed.top_logprobs or [], echoed.text_offset or []
    assert len(values) == len(top) == len(offsets) == len(echoed.tokens or []) >= len(ids) + 6
    assert (values[0], top[0]) == (None, None)
    assert values[len(ids) : len(ids) + 6] == pytest.approx(choice.logprobs.token_logprobs, abs=2e-4)
    assert [len(entry) for entry in top[1 : len(ids) + 6]] == [3] * (len(ids) + 5)
    for place, (begin, token) in enumerate(zip(offsets, echoed.tokens or [], strict=True)):
        assert again.choices[0].text[begin:].startswith(token), place
    of_prompt = extra(again.choices[0], "prompt_logprobs")
    assert of_prompt[0] is None
    assert len(of_prompt) == len(ids) + 6
    for place, (index, entry) in enumerate(zip([*ids, *drawn], of_prompt, strict=True)):
        if place:
            own = entry[str(index)]
            assert own["logprob"] == pytest.approx(values[place], abs=1e-6)
            assert own["decoded_token"] == tokenizer.token_text(index)
            assert {1, 2} <= {other["rank"] for other in entry.values()}
            assert len(entry) == (2 if own["rank"] <= 2 else 3)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
async def test_the_bounds_of_the_repetition_penalty_are_honoured(client: openai.AsyncOpenAI, mode: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "max_tokens": 4, "logprobs": 2}
    for penalty in (0.001, 1000):
        answer = await client.completions.create(
            **asked, extra_body={"repetition_penalty": penalty, "logprobs_mode": mode, "ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
    for penalty in (1e-38, 1e38):
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.completions.create(**asked, extra_body={"repetition_penalty": penalty})
        assert refusal.value.param == "repetition_penalty"


async def test_no_token_is_lost_among_the_alternatives(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    """Ids 100 to 129 of the built-in model are bytes of characters, which have one and the same text."""
    named = list(range(100, 130))
    asked: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "max_tokens": 2, "temperature": 0}
    few = await client.completions.create(**asked, logprobs=1, extra_body={"logprob_token_ids": named})
    every = await client.completions.create(**asked, logprobs=-1)
    assert few.choices[0].logprobs is not None
    assert every.choices[0].logprobs is not None
    for some, all_of_them, token in zip(
        few.choices[0].logprobs.top_logprobs or [],
        every.choices[0].logprobs.top_logprobs or [],
        few.choices[0].logprobs.tokens or [],
        strict=True,
    ):
        assert len(some) == 31
        assert len(all_of_them) == 2048
        assert some.keys() == {token, *(tokenizer.keys[index] for index in named)}
        assert some == pytest.approx({key: all_of_them[key] for key in some}, abs=2e-4)
    talk = await client.chat.completions.create(
        model="tiny", messages=SUM, max_tokens=1, logprobs=True, extra_body={"logprob_token_ids": named}
    )
    assert talk.choices[0].logprobs is not None
    entries = (talk.choices[0].logprobs.content or [])[0].top_logprobs
    assert [bytes(entry.bytes or []) for entry in entries] == [tokenizer.token_bytes(index) for index in named]
    assert len({bytes(entry.bytes or []) for entry in entries}) == len(named)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_can_be_scored_alone(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, stream: bool
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [TEXT, "A block table"],
        "echo": True,
        "logprobs": 2,
        "n": 2,
    }
    longer = await client.completions.create(**asked, max_tokens=1, temperature=0)
    if stream:
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                **asked, max_tokens=0, stream=True, stream_options={"include_usage": True}
            )
        ]
        choices = sorted((c for chunk in chunks for c in chunk.choices if c.text), key=lambda choice: choice.index)
        ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
        usage = chunks[-1].usage
    else:
        whole = await client.completions.create(**asked, max_tokens=0)
        choices, usage = whole.choices, whole.usage
        ends = [choice.finish_reason for choice in choices]
    assert ends == ["length"] * 4
    assert usage is not None
    assert (usage.completion_tokens, usage.total_tokens) == (0, usage.prompt_tokens)
    for choice, long in zip(choices, longer.choices, strict=True):
        scored, other = choice.logprobs, long.logprobs
        assert scored is not None
        assert other is not None
        ids = tokenizer.encode(asked["prompt"][choice.index // 2])
        assert choice.text == asked["prompt"][choice.index // 2]
        assert len(scored.tokens or []) == len(ids) == len(other.tokens or []) - 1
        assert (scored.token_logprobs or [])[1:] == pytest.approx((other.token_logprobs or [])[1:-1], abs=2e-4)
        assert scored.text_offset == (other.text_offset or [])[:-1]


async def test_a_streamed_echo_has_the_log_probabilities_of_the_whole_one(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The scheduler", "A block table"],
        "echo": True,
        "logprobs": 2,
        "max_tokens": 5,
        "temperature": 0,
        "n": 2,
        "extra_body": {"return_token_ids": True},
    }
    whole = await client.completions.create(**asked)
    pieces: dict[int, dict[str, list[Any]]] = {}
    async for chunk in await client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            mine = pieces.setdefault(
                choice.index, {"text": [], "tokens": [], "values": [], "offsets": [], "ids": []}
            )
            mine["text"].append(choice.text)
            mine["ids"] += (choice.model_extra or {}).get("token_ids", [])
            if choice.logprobs is not None:
                mine["tokens"] += choice.logprobs.tokens or []
                mine["values"] += choice.logprobs.token_logprobs or []
                mine["offsets"] += choice.logprobs.text_offset or []
    assert len(whole.choices) == 4
    for choice in whole.choices:
        mine = pieces[choice.index]
        assert choice.logprobs is not None
        assert "".join(mine["text"]) == choice.text
        assert mine["tokens"] == choice.logprobs.tokens
        assert mine["offsets"] == choice.logprobs.text_offset
        assert mine["ids"] == extra(choice, "token_ids")
        assert mine["values"][0] is None
        assert mine["values"][1:] == pytest.approx((choice.logprobs.token_logprobs or [])[1:], abs=2e-4)


async def test_alternatives_in_a_chat(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "logprobs": True, "temperature": 0, "max_tokens": 2}
    every = await client.chat.completions.create(**asked, top_logprobs=-1)
    named = await client.chat.completions.create(
        **asked,
        top_logprobs=1,
        extra_body={
            "logprob_token_ids": [THINK, 9],
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "prompt_logprobs": 0,
        },
    )
    assert every.choices[0].logprobs is not None
    assert named.choices[0].logprobs is not None
    ids = extra(named.choices[0], "token_ids")
    for place, (wide, narrow) in enumerate(
        zip(every.choices[0].logprobs.content or [], named.choices[0].logprobs.content or [], strict=True)
    ):
        assert len(wide.top_logprobs) == 2048
        assert math.fsum(math.exp(entry.logprob) for entry in wide.top_logprobs) == pytest.approx(1, abs=1e-4)
        assert narrow.token == f"token_id:{ids[place]}"
        known = {entry.token: entry.logprob for entry in narrow.top_logprobs}
        assert list(known) == [
            narrow.token,
            *(t for t in (f"token_id:{THINK}", "token_id:9") if t != narrow.token),
        ]
        texts = {entry.token: entry.logprob for entry in wide.top_logprobs}
        assert known[f"token_id:{THINK}"] == pytest.approx(texts["<think>"], abs=2e-4)
    prompt = extra(named, "prompt_token_ids")
    assert named.usage is not None
    assert len(prompt) == named.usage.prompt_tokens
    assert tokenizer.decode(prompt, skip_special_tokens=False).startswith("<|im_start|>user")
    scores = extra(named, "prompt_logprobs")
    assert [set(entry) for entry in scores[1:]] == [{str(i), str(THINK), "9"} for i in prompt[1:]]


async def test_answers_have_the_shapes_that_are_documented(world: World, client: openai.AsyncOpenAI) -> None:
    wishes = {
        "model": "tiny",
        "max_tokens": 3,
        "n": 2,
        "logprob_token_ids": [9],
        "return_token_ids": True,
        "temperature": 1,
    }
    async with httpx.AsyncClient(base_url=world.url) as http:
        for path, shape, chunk, more in (
            ("chat/completions", ChatCompletion, ChatChunk, {"messages": ASK, "logprobs": True}),
            (
                "completions",
                Completion,
                Completion,
                {"prompt": ["a", "b"], "logprobs": 1, "echo": True},
            ),
        ):
            whole = await http.post(f"/v1/{path}", json={**wishes, **more, "prompt_logprobs": 1})
            found = shape.model_validate_json(whole.content).model_dump(exclude_none=True)
            assert found["choices"][0]["logprobs"]
            assert len(found["choices"][-1]["token_ids"]) == 3
            assert ("prompt_logprobs" in found) == (path == "chat/completions")
            assert ("prompt_token_ids" in found["choices"][-1]) == (path == "completions")
            streamed = await http.post(f"/v1/{path}", json={**wishes, **more, "stream": True})
            events = [line[6:] for line in streamed.text.split("\n\n") if line.startswith("data: {")]
            chunks = [chunk.model_validate_json(event) for event in events]
            assert sum(len(c.token_ids or ()) for event in chunks for c in event.choices) == 3 * len(
                found["choices"]
            )
            plain = await http.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 1, **more})
            assert "token_ids" not in plain.text
            assert "prompt_logprobs" not in plain.text


async def test_modes_tell_other_numbers_of_the_same_draw(client: openai.AsyncOpenAI) -> None:
    found: dict[str, list[float]] = {}
    for mode in ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"):
        answer = await client.completions.create(
            model="tiny",
            prompt="The",
            max_tokens=1,
            temperature=0.5,
            seed=3,
            logprobs=8,
            extra_body={"top_k": 4, "logprobs_mode": mode},
        )
        assert answer.choices[0].logprobs is not None
        found[mode] = list((answer.choices[0].logprobs.top_logprobs or [])[0].values())
    assert sum(map(math.exp, found["processed_logprobs"][:4])) == pytest.approx(1, abs=1e-4)
    assert found["processed_logprobs"][4:] == [-9999.0] * 4, "what the filter left out, as OpenAI writes it"
    assert [v / 0.5 for v in found["raw_logits"][:4]] == pytest.approx(found["processed_logits"][:4], abs=1e-3)
    gaps = [a - b for a, b in zip(found["raw_logits"], found["raw_logprobs"], strict=True)]
    assert gaps == pytest.approx([gaps[0]] * 8, abs=1e-3)


async def test_allowed_ids_and_bad_words_shape_the_text(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    plain: dict[str, Any] = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 40}
    free = (await client.chat.completions.create(**plain)).choices[0].message.content or ""
    word = free.split()[2]
    without = await client.chat.completions.create(**plain, extra_body={"bad_words": [word]})
    text = without.choices[0].message.content or ""
    assert word not in text.split()
    assert text.split()[:2] == free.split()[:2]
    yes, no = (tokenizer.encode(word)[0] for word in (" yes", " no"))
    chosen = await client.chat.completions.create(
        **plain, extra_body={"allowed_token_ids": [yes, no], "ignore_eos": True, "return_token_ids": True}
    )
    assert set(extra(chosen.choices[0], "token_ids")) <= {yes, no}


async def test_a_thought_has_a_budget(client: openai.AsyncOpenAI) -> None:
    plain: dict[str, Any] = {"model": "tiny", "messages": SUM, "temperature": 0, "max_tokens": 120}
    free = await client.chat.completions.create(**plain, extra_body={"return_token_ids": True})
    ids = extra(free.choices[0], "token_ids")
    assert THINK in ids, "the question is one that the model thinks about"
    assert ids.index(UNTHINK) - ids.index(THINK) > 6
    for budget in (0, 4):
        answer = await client.chat.completions.create(
            **plain, extra_body={"return_token_ids": True, "thinking_token_budget": budget}
        )
        short = extra(answer.choices[0], "token_ids")
        begin = ids.index(THINK) + 1
        assert short[: begin + budget] == ids[: begin + budget]
        assert short[begin + budget] == UNTHINK
        assert answer.choices[0].finish_reason == "stop"
        assert short[-1] == END


async def test_the_best_of_several_are_those_with_the_highest_mean(client: openai.AsyncOpenAI) -> None:
    plain: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The scheduler", "Once"],
        "temperature": 1.2,
        "seed": 5,
        "max_tokens": 8,
    }
    every = await client.completions.create(**plain, n=5, logprobs=0)
    best = await client.completions.create(**plain, n=2, best_of=5)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage == every.usage, "what was thrown away was made all the same"
    for prompt in range(2):
        means = {}
        for choice in every.choices[5 * prompt : 5 * prompt + 5]:
            assert choice.logprobs is not None
            values = [value for value in choice.logprobs.token_logprobs or [] if value is not None]
            means[choice.text] = math.fsum(values) / len(values)
        expected = sorted(means, key=lambda text: means[text], reverse=True)[:2]
        assert [choice.text for choice in best.choices[2 * prompt : 2 * prompt + 2]] == expected


async def test_a_prompt_is_cut_only_when_asked(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    plain: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "temperature": 0, "echo": True}
    for more, kept in (
        ({"truncate_prompt_tokens": 4}, ids[-4:]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, ids[:4]),
        ({"truncate_prompt_tokens": 999}, ids),
    ):
        answer = await client.completions.create(
            **plain, prompt=TEXT, extra_body={**more, "return_token_ids": True}
        )
        assert extra(answer.choices[0], "prompt_token_ids") == kept
        assert answer.choices[0].text.startswith(tokenizer.decode(kept))
    long = TEXT * 60
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**plain, prompt=long)
    assert caught.value.code == "context_length_exceeded"
    fitted = await client.completions.create(**plain, prompt=long, extra_body={"truncate_prompt_tokens": -1})
    assert fitted.usage is not None
    assert fitted.usage.prompt_tokens == 510
    chat = await client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=2, extra_body={"truncate_prompt_tokens": 5}
    )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == 5


async def test_ends_of_a_text(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    plain: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 30}
    ids = extra(
        (
            await client.completions.create(**plain, extra_body={"return_token_ids": True, "ignore_eos": True})
        ).choices[0],
        "token_ids",
    )
    stop = next(token for at, token in enumerate(ids) if at > 4)
    first = ids.index(stop)
    for include in (False, True):
        ended = await client.completions.create(
            **plain,
            extra_body={
                "stop_token_ids": [stop],
                "include_stop_str_in_output": include,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        assert ended.choices[0].finish_reason == "stop"
        assert ended.choices[0].text == tokenizer.decode(ids[: first + include])
        assert extra(ended.choices[0], "token_ids") == ids[: first + 1]
        assert ended.usage is not None
        assert ended.usage.completion_tokens == first + 1
    later = await client.completions.create(
        **plain,
        extra_body={
            "stop_token_ids": [stop],
            "min_tokens": first + 3,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert stop not in extra(later.choices[0], "token_ids")[: first + 3]
    for stream in (False, True):
        body: dict[str, Any] = {
            **plain,
            "logit_bias": {str(stop): 100},
            "extra_body": {"repetition_detection": {"max_pattern_size": 2, "min_count": 4}},
        }
        if stream:
            parts = [chunk.choices[0] async for chunk in await client.completions.create(**body, stream=True)]
            reasons, text = (
                [part.finish_reason for part in parts if part.finish_reason],
                "".join(p.text for p in parts),
            )
        else:
            whole = (await client.completions.create(**body)).choices[0]
            reasons, text = [whole.finish_reason], whole.text
        assert reasons == ["repetition"]
        assert text == tokenizer.decode([stop] * 4)


async def test_wishes_that_leave_nothing_are_the_requests_fault(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            max_tokens=3,
            extra_body={"allowed_token_ids": [END], "min_tokens": 2},
        )
    assert caught.value.param == "allowed_token_ids"
    assert "'allowed_token_ids' leaves no token to choose, with min_tokens." in caught.value.message


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("both", {"prompt_logprobs": -2}, "prompt_logprobs"),
    ("both", {"prompt_logprobs": 21}, "prompt_logprobs"),
    ("both", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ("both", {"logprob_token_ids": [1]}, "logprob_token_ids"),
    ("both", {"prompt_logprobs": 0, "logprob_token_ids": [2048]}, "logprob_token_ids"),
    ("both", {"prompt_logprobs": 0, "logprob_token_ids": list(range(129))}, "logprob_token_ids"),
    ("both", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("both", {"allowed_token_ids": [5, 2048]}, "allowed_token_ids"),
    ("both", {"stop_token_ids": [2048]}, "stop_token_ids"),
    ("both", {"bad_words": [""]}, "bad_words[0]"),
    ("both", {"bad_words": ["a"] * 65}, "bad_words"),
    ("both", {"logprobs_mode": "cooked"}, "logprobs_mode"),
    ("both", {"logprobs_mode": "processed_logprobs"}, "logprobs_mode"),
    ("both", {"logprobs_mode": "raw_logits", "use_beam_search": True, "n": 2}, "logprobs_mode"),
    ("both", {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ("both", {"thinking_token_budget": -1}, "thinking_token_budget"),
    ("both", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("both", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ("both", {"truncation_side": "left"}, "truncation_side"),
    ("both", {"truncate_prompt_tokens": 4, "truncation_side": "middle"}, "truncation_side"),
    ("both", {"repetition_detection": {"max_pattern_size": 2}}, "repetition_detection.min_count"),
    ("both", {"repetition_detection": {"max_pattern_size": 2, "min_count": 1}}, "repetition_detection.min_count"),
    (
        "both",
        {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}},
        "repetition_detection",
    ),
    ("both", {"spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
    ("both", {"use_beam_search": True, "temperature": 0.7}, "use_beam_search"),
    ("both", {"use_beam_search": True, "stream": True}, "use_beam_search"),
    ("both", {"use_beam_search": True, "stop": "x"}, "use_beam_search"),
    ("both", {"use_beam_search": True, "prompt_logprobs": 0}, "use_beam_search"),
    ("both", {"use_beam_search": True, "thinking_token_budget": 0}, "use_beam_search"),
    ("both", {"length_penalty": 2}, "length_penalty"),
    ("chat", {"best_of": 2}, "best_of"),
    ("chat", {"logprobs": True, "top_logprobs": -1, "max_tokens": 200}, "top_logprobs"),
    ("completion", {"logprobs": -1, "max_tokens": 129}, "logprobs"),
    ("chat", {"logprobs": True, "logprob_token_ids": list(range(128)), "n": 8}, "logprob_token_ids"),
    ("completion", {"logprobs": -1, "max_tokens": 65, "best_of": 2}, "logprobs"),
    ("completion", {"prompt": [5] * 200, "prompt_logprobs": -1}, "prompt_logprobs"),
    ("completion", {"n": 3, "best_of": 2}, "best_of"),
    ("completion", {"best_of": 2, "stream": True}, "best_of"),
    ("completion", {"best_of": 2, "logprobs_mode": "raw_logits"}, "best_of"),
    ("both", {"bad_words": "page"}, "bad_words"),
    ("both", {"stop_token_ids": [2048]}, "stop_token_ids"),
    ("completion", {"prompt": ["a"] * 9, "best_of": 8}, "best_of"),
]


async def test_a_beam_search_finds_likelier_texts_than_the_greedy_one(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)
    common: dict[str, Any] = {"model": "tiny", "max_tokens": 8}
    greedy = await client.completions.create(
        **common, prompt=ids, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    found = await client.completions.create(
        **common,
        prompt=[ids, ids[:3]],
        n=3,
        extra_body={"use_beam_search": True, "ignore_eos": True, "return_token_ids": True, "best_of": 4},
    )
    assert [choice.index for choice in found.choices] == list(range(6))
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids) + 3
    assert found.usage.completion_tokens == 2 * 4 * 8, "what the answer leaves out was made all the same"

    async def logprob(drawn: list[int]) -> float:
        scored = await client.completions.create(
            model="tiny", prompt=[*ids, *drawn], max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        entries = extra(scored.choices[0], "prompt_logprobs")[len(ids) :]
        return math.fsum(entry[str(token)]["logprob"] for entry, token in zip(entries, drawn, strict=True))

    mine = found.choices[:3]
    totals = [await logprob(extra(choice, "token_ids")) for choice in mine]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] >= await logprob(extra(greedy.choices[0], "token_ids")) - 1e-3
    assert len({choice.text for choice in mine}) == 3
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 6
    said = await client.chat.completions.create(
        model="tiny", messages=ASK, n=2, max_tokens=40, extra_body={"use_beam_search": True, "length_penalty": 0}
    )
    assert [choice.index for choice in said.choices] == [0, 1]
    assert all(choice.message.content for choice in said.choices)


async def test_what_cannot_be_honoured_is_refused_by_name(world: World, client: openai.AsyncOpenAI) -> None:
    """As the contract has it: 400, `invalid_request_error`, the field, and nothing about a retry."""
    bases: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("/v1/chat/completions", {"model": "tiny", "messages": ASK}),
        "completion": ("/v1/completions", {"model": "tiny", "prompt": "a"}),
    }
    async with httpx.AsyncClient(base_url=world.url) as http:
        for which, fields, param in REFUSED:
            for name, (path, base) in bases.items():
                if which in (name, "both"):
                    answer = await http.post(path, json={**base, **fields})
                    error = answer.json()["error"]
                    said = (answer.status_code, error["type"], error["param"], error["code"])
                    assert said == (400, "invalid_request_error", param, None), (name, fields, error)
                    assert f"'{param}" in error["message"]
                    assert "x-should-retry" not in answer.headers
    assert (await client.completions.create(model="tiny", prompt="a", max_tokens=1)).choices


async def test_a_model_without_marks_of_thoughts_has_no_budget_for_them(world: World) -> None:
    engine: WireEngine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="no tokens of it open and close a thought") as caught:
            await client.chat.completions.create(
                model="tiny", messages=ASK, extra_body={"thinking_token_budget": 5}
            )
    assert caught.value.param == "thinking_token_budget"
    assert not engine.generates
