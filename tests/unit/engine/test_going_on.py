"""An answer that one engine has begun goes on at another as if nothing had happened, wherever it was cut."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from tests.effort import examples
from tests.engine_specs import run, tiny_spec

from quire_engine.engine import Engine
from quire_engine.errors import RequestRefused
from quire_schemas.wire import BeamSearch, Delta, Generate, Pooling, Repetition, Sampling, Structured, Thinking

PROMPT = [50, 60, 70, 80, 90]
JSON = Structured("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 11, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "logprobs": {"temperature": 0.0, "logprobs": 3, "logprob_token_ids": (7, 8)},
    "bad words": {"temperature": 0.0, "bad_words": ((300, 301), (60,))},
    "min tokens": {"temperature": 0.0, "min_tokens": 20, "ignore_eos": False},
    "repetition": {"temperature": 0.0, "repetition": Repetition(1, 3, 2)},
    "grammar": {"temperature": 0.7, "seed": 3, "structured": JSON},
    "thinking": {"temperature": 0.0, "thinking": Thinking(6, (90,), (201,))},
    "script": {},
}


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    """Two with little in common: how they schedule, what they have cached, how they draw for who has no seed."""
    specs = {
        "one": tiny_spec(),
        "other": tiny_spec(
            replica_id="tiny-1", max_num_batched_tokens=16, prefix_caching=True, async_scheduling=True
        ),
        "script one": tiny_spec(runner="scripted"),
        "script other": tiny_spec(runner="scripted", max_num_batched_tokens=7, async_scheduling=True),
    }
    return {name: Engine.load(spec) for name, spec in specs.items()}


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def ends_of(deltas: list[Delta]) -> tuple[Any, ...]:
    return deltas[-1].finish_reason, deltas[-1].stop_token_id, deltas[-1].error_code


@pytest.mark.parametrize("way", WAYS)
def test_wherever_it_was_cut_the_answer_is_the_same(engines: dict[str, Engine], way: str) -> None:
    scripted = way == "script"
    one, other = (engines[f"script {name}" if scripted else name] for name in ("one", "other"))
    asked: dict[str, Any] = {"max_tokens": 40, "ignore_eos": not scripted and way != "grammar", **WAYS[way]}
    sampling = Sampling(**asked, script=tuple(range(100, 130)) if scripted else None)
    whole = run(one, Generate("whole", list(PROMPT), sampling))["whole"]
    expected = tokens_of(whole)
    assert len(expected) > 2
    rng = random.Random(way)
    cuts = {1, len(expected) - 1, *(rng.randrange(1, len(expected)) for _ in range(examples(4)))}
    beside = Generate("beside", [9, 8, 7], Sampling(12, temperature=0.0, script=(5, 6) if scripted else None))
    for cut in sorted(cuts - {sampling.max_tokens}):
        later = Generate(f"from {cut}", list(PROMPT), sampling, written=tuple(expected[:cut]))
        heard = run(other, later, msgspec.structs.replace(beside, token_ids=[9, 8, 7]))[later.id]
        assert tokens_of(heard) == expected[cut:], cut
        assert ends_of(heard) == ends_of(whole)
        scores = [each.logprob for delta in heard for each in delta.logprobs or ()]
        before = [each.logprob for delta in whole for each in delta.logprobs or ()][cut:]
        assert scores == pytest.approx(before, abs=1e-4)


def test_it_may_be_preempted_and_sent_on_once_more(engines: dict[str, Engine]) -> None:
    sampling = Sampling(40, temperature=0.0, ignore_eos=True)
    expected = tokens_of(run(engines["one"], Generate("whole", list(PROMPT), sampling))["whole"])
    crowded = Engine.load(tiny_spec(num_blocks=5, max_num_batched_tokens=16))
    several = [
        Generate(str(number), list(PROMPT), sampling, written=tuple(expected[: 7 + number])) for number in range(4)
    ]
    heard = run(crowded, *several)
    assert crowded.stats().preemptions > 0
    for number, deltas in enumerate(heard.values()):
        assert tokens_of(deltas) == expected[7 + number :]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"written": (1 << 20,)}, "outside the vocabulary"),
        ({"written": (-1,)}, "outside the vocabulary"),
        ({"written": (5, 6, 7)}, "none to draw"),
        ({"written": (5,), "beam": BeamSearch(2)}, "only an answer that is drawn"),
        ({"written": (5,), "pooling": Pooling("last")}, "only an answer that is drawn"),
    ],
)
def test_what_is_no_beginning_of_the_answer_is_refused(
    engines: dict[str, Engine], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        engines["one"].add(Generate("x", [1, 2], Sampling(3, temperature=0.0), **fields))
    assert not engines["one"].has_work
