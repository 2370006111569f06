"""`/tokenize`, `/detokenize`, `/v1/score`, and the paths of other servers that are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import ASK, World

from quire.router.api.absent import ABSENT
from quire_schemas import signals, wire
from quire_schemas.openai.answer import ErrorBody

WORDS = "naïve 你好 🦊🙂 — done<|im_end|>"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ mood }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def ask(world: World, path: str, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=world.url, timeout=60) as http:
        return (await http.post(path, json=body)).json()


async def test_a_text_is_tokenized_and_comes_back_without_any_replica(world: World) -> None:
    await world.table(world.route())
    ids = world.tokenizer.encode(WORDS)
    for path in ("/tokenize", "/v1/tokenize"):
        assert await ask(world, path, model="org/tiny", prompt=WORDS) == {
            "count": len(ids),
            "max_model_len": 512,
            "tokens": ids,
            "token_strs": None,
        }
    for path in ("/detokenize", "/v1/detokenize"):
        assert await ask(world, path, tokens=ids) == {"prompt": WORDS}, "the only model needs no name"
    spelled = await ask(world, "/tokenize", prompt="The quick", return_token_strs=True)
    assert "".join(spelled["token_strs"]) == "TheĠquick"
    assert await ask(world, "/tokenize", prompt="") == {
        "count": 0,
        "max_model_len": 512,
        "tokens": [],
        "token_strs": None,
    }
    assert await ask(world, "/detokenize", tokens=[]) == {"prompt": ""}
    found = await world.metrics()
    assert found[f'{signals.REQUESTS}_total{{finish="stop",model="tiny",operation="tokenize"}}'] == 4


async def test_a_conversation_has_the_ids_that_a_chat_begins_with(world: World) -> None:
    (world.folder / "tools.jinja").write_text(WITH_TOOLS)
    engine = await world.engine()
    await world.serve(engine, chat_template_file=str(world.folder / "tools.jinja"))
    variants: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"mood": "!"}},
        {"add_special_tokens": True},
    ]
    goes_on = {"messages": [*ASK, {"role": "assistant", "content": "Well"}], "continue_final_message": True}
    async with world.client() as client:
        for more in [*variants, goes_on]:
            asked: dict[str, Any] = {"messages": ASK, **more}
            told = await ask(world, "/tokenize", model="tiny", **asked)
            await client.post(
                "/chat/completions", body={"model": "tiny", "max_tokens": 1, **asked}, cast_to=object
            )
            assert told["tokens"] == engine.generates[-1].token_ids
            assert told["count"] == len(told["tokens"])
    tooled = await ask(world, "/tokenize", messages=ASK, tools=TOOLS)
    text = (await ask(world, "/detokenize", tokens=tooled["tokens"]))["prompt"]
    assert text == "[add]<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "messages", "or prompt must be given"),
        ("/tokenize", {"prompt": "a", "messages": ASK}, "messages", "not both"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "must be a string"),
        ("/tokenize", {"prompt": "a", "tools": TOOLS}, "tools", "only for requests with messages"),
        ("/tokenize", {"messages": ASK, "tools": [{"type": "x"}]}, "tools[0].type", "must be 'function'"),
        ("/tokenize", {"messages": ASK, "chat_template": "x"}, "chat_template", "a template is code"),
        ("/tokenize", {"messages": ASK, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "not set"),
        ("/tokenize", {"messages": []}, "messages", "at least 1"),
        ("/tokenize", {"promt": "a"}, "promt", "Did you mean 'prompt'?"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, "model", "does not exist"),
        ("/detokenize", {}, "tokens", "is required"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": "abc"}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": [5, 99_999]}, "tokens", "outside the vocabulary"),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": True}, "skip_special_tokens", "written out"),
        ("/v1/score", {"model": "tiny", "queries": "a"}, "queries", "documents must be given"),
        ("/v1/score", {"model": "tiny", "queries": "a", "text_2": "b"}, "queries", "text_1 and text_2"),
        (
            "/v1/score",
            {"model": "tiny", "queries": "a", "documents": "b", "items": "c"},
            "queries",
            "nothing else",
        ),
        ("/v1/score", {"model": "tiny", "text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "2 and 1"),
        ("/v1/score", {"model": "tiny", "queries": [], "documents": "b"}, "queries", "must not be empty"),
        ("/v1/score", {"model": "tiny", "queries": "a", "documents": ["b", ""]}, "documents[1]", "is empty"),
        ("/v1/score", {"model": "tiny", "queries": "a", "items": [[5], [99_999]]}, "items[1]", "outside the"),
        ("/v1/score", {"model": "tiny", "queries": "a", "items": "b", "softmax": True}, "softmax", "cosine"),
    ],
)
async def test_what_is_not_honoured_is_refused(
    world: World, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    await world.serve(await world.engine())
    error = ErrorBody.model_validate(await ask(world, path, **body)).error
    assert error.param == param
    assert words in error.message


async def test_without_a_name_there_must_be_one_model(world: World) -> None:
    assert (await ask(world, "/tokenize", prompt="a"))["error"]["code"] == "model_not_found"
    await world.table(world.route(), world.route(model="other", names=("other",)))
    error = (await ask(world, "/tokenize", prompt="a"))["error"]
    assert (error["param"], error["code"]) == ("model", None)
    assert (await ask(world, "/tokenize", model="other", prompt="a"))["count"] == 1


@pytest.fixture(scope="module")
def engine_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="scores") as spec:
        yield spec


async def test_scores_are_cosines_of_the_embeddings(world: World, engine_spec: wire.EngineSpec) -> None:
    await world.serve_process(engine_spec)
    texts = ["When the scheduler", "A block of a page", "naïve 你好 🦊", "When the scheduler"]
    async with world.client() as client:
        made = await client.embeddings.create(model="tiny", input=texts)
        means = await client.embeddings.create(
            model="tiny", input=texts, dimensions=16, extra_body={"pooling": "mean"}
        )
    vectors, short = [entry.embedding for entry in made.data], [entry.embedding for entry in means.data]

    def cosine(found: list[list[float]], left: int, right: int) -> float:
        return sum(a * b for a, b in zip(found[left], found[right], strict=True))

    one = await ask(world, "/v1/score", model="tiny", queries=texts[0], documents=texts[1:])
    assert [(entry["index"], entry["object"]) for entry in one["data"]] == [
        (0, "score"),
        (1, "score"),
        (2, "score"),
    ]
    assert [entry["score"] for entry in one["data"]] == pytest.approx(
        [cosine(vectors, 0, n) for n in (1, 2, 3)], abs=1e-5
    )
    assert one["data"][2]["score"] == pytest.approx(1, abs=1e-5)
    assert (one["object"], one["model"]) == ("list", "tiny")
    tokens = made.usage.prompt_tokens
    assert one["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}, "the query is read once"
    pairs = await ask(world, "/score", model="tiny", text_1=texts[:2], text_2=texts[2:])
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx(
        [cosine(vectors, 0, 2), cosine(vectors, 1, 3)], abs=1e-5
    )
    for left, right in (("data_1", "data_2"), ("queries", "items")):
        sides = {left: texts[0], right: [texts[1]]}
        other = await ask(world, "/score", model="tiny", pooling="mean", dimensions=16, **sides)
        assert other["data"][0]["score"] == pytest.approx(cosine(short, 0, 1), abs=1e-5)


async def test_a_scripted_model_has_no_scores(world: World) -> None:
    await world.serve(await world.engine(), scripted=True)
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="no hidden states"):
            await client.post("/score", body={"model": "tiny", "queries": "a", "documents": "b"}, cast_to=object)


async def test_paths_of_other_servers_are_refused_by_name(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for path in [*ABSENT, "/v1/audio/speech", "/v1/audio/transcriptions/", "/v1/fine_tuning/jobs/x/events"]:
            for method in ("POST",) if path == "/v1/responses/compact" else ("GET", "POST"):  # which may be an id
                answer = await http.request(method, path)
                assert answer.status_code == 404, (method, path)
                message = answer.json()["error"]["message"]
                assert path.startswith(message.split(" is not served here. ")[0])
                if path.startswith("/v1/messages"):  # in the shape of that API, which has no codes
                    assert answer.json()["error"]["type"] == "not_found_error"
                else:
                    assert ErrorBody.model_validate(answer.json()).error.code == "endpoint_not_served", path
        slip = await http.post("/v1/audios")
        assert (slip.status_code, slip.json()["error"]["code"]) == (404, "not_found")
    async with world.client() as client:
        with pytest.raises(openai.NotFoundError, match="requests and answers are text"):
            await client.audio.speech.create(model="tiny", voice="alloy", input="x")
        with pytest.raises(openai.NotFoundError, match="cross-encoder"):
            await client.post("/rerank", body={}, cast_to=object)
