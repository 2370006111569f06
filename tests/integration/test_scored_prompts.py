"""Texts are scored over HTTP as evaluation harnesses do it, against transformers' logits of the same ids.

A real engine in float32, prompts in chunks of 64 tokens, a prefix cache that has them from the second time on. By
default the figure of docs/sampling.md is shown once; the other forms of the question are asked by night.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import transformers
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World

from quire import builtin
from quire.text import Tokenizer
from quire_schemas import wire

CLOSE = 1e-3
TEXTS = [
    "The scheduler gives each request a share of the step.",
    "naïve café, Ω≈ç√∫, 你好世界, 🙂👩‍👩‍👧 — “quotes” …",
    "def f(x):\n    return x + 1\n\n0123456789",
    "PagedAttention keeps the KV cache in small blocks that need not be contiguous. " * 4,
    "Blocks of a page hold keys and values, and a table says where they are. " * 12,
]
DIALOGUE = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "Hello! I am the small model that ships with Quire. Ask me about serving language models.",
)
"""A conversation whose answer the built-in model would give, and end there."""


class Reference:
    """transformers on the built-in checkpoint, in float32."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.load(builtin.path("tiny"))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(builtin.path("tiny"), dtype=torch.float32)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocabulary]: of what may come behind each token."""
        key = tuple(ids)
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return self._known[key]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def engine_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="scored", prefix_caching=True, max_num_batched_tokens=64) as spec:
        yield spec


@pytest.fixture
async def served(world: World, engine_spec: wire.EngineSpec) -> World:
    await world.serve_process(engine_spec, prefix_caching=True)
    return world


async def ask(world: World, **body: Any) -> list[Any]:
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{world.url}/v1/completions", json={"model": "tiny", "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    choices: list[Any] = answer.json()["choices"]
    return choices


def check(reference: Reference, ids: list[int], shown: dict[str, Any], top: int) -> None:
    """The entries of the prompt `ids` are the reference's."""
    expected, keys = reference.logprobs(ids), reference.tokenizer.keys
    assert shown["tokens"][: len(ids)] == [keys[index] for index in ids]
    assert (shown["token_logprobs"][0], shown["top_logprobs"][0]) == (None, None)
    for place in range(1, len(ids)):
        row = expected[place - 1]
        assert shown["token_logprobs"][place] == pytest.approx(row[ids[place]].item(), abs=CLOSE), place
        best = row.topk(top).values.tolist()
        found = shown["top_logprobs"][place]
        assert sorted(found.values(), reverse=True) == pytest.approx(best, abs=CLOSE), place
        for index in row.topk(top).indices.tolist():
            if keys[index] in found:  # equals may have changed places at the end
                assert found[keys[index]] == pytest.approx(row[index].item(), abs=CLOSE), place


@pytest.mark.parametrize(
    ("top", "more"),
    [(5, 1), *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((1, 0), (5, 0), (1, 1)))],
)
async def test_an_echoed_prompt_has_the_references_scores(
    served: World, reference: Reference, top: int, more: int
) -> None:
    every = [reference.tokenizer.encode(text) for text in TEXTS]
    assert min(map(len, every)) < 64 < max(map(len, every)), "some go over a chunk's end, some do not"
    asked: dict[str, Any] = {"echo": True, "max_tokens": more, "logprobs": top}
    for _ in range(2):  # the second time all of it is in the cache
        for prompts in (TEXTS, every):
            for ids, text, choice in zip(every, TEXTS, await ask(served, prompt=prompts, **asked), strict=True):
                check(reference, ids, choice["logprobs"], top)
                assert choice["text"].startswith(text)
                assert {len(entry) for entry in choice["logprobs"].values()} == {len(ids) + more}


def likelihood(shown: dict[str, Any], begin: int) -> tuple[float, bool]:
    """What a harness makes of an answer to a context of `begin` tokens, a continuation, and one token more."""
    values, tops = shown["token_logprobs"][begin:-1], shown["top_logprobs"][begin:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


@pytest.mark.nightly
async def test_the_likelihood_of_continuations_and_whether_they_are_greedy(
    served: World, reference: Reference
) -> None:
    tokenizer, draw = reference.tokenizer, random.Random(7)
    cases: list[tuple[list[int], list[int]]] = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        cut = draw.randrange(1, len(ids) - 1)
        cases.append((ids[:cut], ids[cut:]))
        (said,) = await ask(
            served,
            prompt=ids[:cut],
            max_tokens=9,
            ignore_eos=True,
            return_token_ids=True,
            skip_special_tokens=False,
        )
        cases.append((ids[:cut], said["token_ids"]))
    context, answer = (tokenizer.encode(part, False) for part in DIALOGUE)
    cases.append((context, answer))
    asked = {"echo": True, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    choices = await ask(served, prompt=[[*context, *rest] for context, rest in cases], **asked)
    greedy_ones = 0
    for (context, rest), choice in zip(cases, choices, strict=True):
        ids = [*context, *rest]
        rows = reference.logprobs(ids)[len(context) - 1 : -1]
        own = rows.gather(1, torch.tensor(rest)[:, None])[:, 0]
        total, greedy = likelihood(choice["logprobs"], len(context))
        assert total == pytest.approx(own.sum().item(), abs=CLOSE * len(rest))
        assert greedy == bool((own == rows.max(-1).values).all())
        greedy_ones += greedy
    assert len(TEXTS) < greedy_ones < len(cases), "there are some of each kind"
    assert choices[-1]["finish_reason"] == "stop", "the last one's next token ends the text"
    assert choices[-1]["text"] == "".join(DIALOGUE).replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert choices[-1]["logprobs"]["text_offset"][-1] == len(choices[-1]["text"])


async def test_the_token_that_ends_a_text_has_its_score_wherever_it_stands(
    served: World, reference: Reference
) -> None:
    ids = reference.tokenizer.encode("".join(DIALOGUE), False)
    row = reference.logprobs(ids)[-1]
    end = int(row.argmax())
    asked: dict[str, Any] = {"prompt": ids, "max_tokens": 5, "logprobs": 2, "return_token_ids": True}
    (whole,) = await ask(served, **asked)
    assert (whole["text"], whole["token_ids"]) == ("", [end])
    assert whole["logprobs"]["token_logprobs"] == pytest.approx([row[end].item()], abs=CLOSE)
    assert whole["logprobs"]["tokens"] == [reference.tokenizer.keys[end]]
    async with served.client() as client:
        stream = await client.completions.create(
            model="tiny", stream=True, temperature=0, prompt=ids, max_tokens=5, logprobs=2
        )
        shown = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices[0].logprobs]
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], temperature=0, logprobs=True
        )
    assert [entry for found in shown for entry in found.token_logprobs or []] == whole["logprobs"][
        "token_logprobs"
    ]
    assert chat.choices[0].finish_reason == "stop"
    assert chat.choices[0].logprobs is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in chat.choices[0].logprobs.content or [])
    assert joined.decode() == chat.choices[0].message.content, "a chat's are those of its text"
