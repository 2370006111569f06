"""Structured output on the built-in model: what ends fits, under any schedule, and neighbours do not notice."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.effort import EFFORT, bound, times
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.serving import Client, greeted, serving, spec_in, until_idle
from torch import Tensor

from quire import LLM, SamplingParams
from quire_engine import grammar as grammar_module
from quire_engine.engine import Engine
from quire_engine.errors import RequestRefused
from quire_engine.step import StepPlan, StepResult
from quire_schemas.wire import Abort, Deltas, Generate, GetStats, Sampling, Stats, Structured, TokenLogprobs

PROMPT = "Question: what is the capital of France?\nAnswer: "

FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date", raises=ValueError)
def _is_date(text: object) -> bool:
    """As RFC 3339 has it, where the year 0000 is one; the library's own check asks Python, which begins with 1."""
    return not isinstance(text, str) or bool(date.fromisoformat(text.replace("0000-", "2000-", 1)))


@dataclass(slots=True)
class Output:
    """What became of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None


def generate(
    llm: LLM, prompts: Sequence[str | list[int]], sampling: Sampling | Sequence[Sampling]
) -> list[Output]:
    """All prompts together through the engine, by what the wire says of them."""
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    ids = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else [*prompt] for prompt in prompts]
    messages = [Generate(str(n), *asked) for n, asked in enumerate(zip(ids, each, strict=True))]
    outputs = []
    for deltas in run(llm.engine, *messages).values():
        outputs.append(output := Output())
        for delta in deltas:
            output.token_ids += delta.token_ids
            output.logprobs += delta.logprobs or []
            if delta.finish_reason is not None:
                output.finish_reason, output.stop_token_id = delta.finish_reason, delta.stop_token_id
                output.error = delta.error
        output.text = llm.tokenizer.decode(output.token_ids)
    return outputs


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin://tiny", dtype="float32", threads=1, max_model_len=512, max_num_seqs=32)


def json_of(schema: Any, whitespace: str | None = "") -> Structured:
    return Structured("json_schema", json.dumps(schema), whitespace)


def ask(llm: LLM, structured: Structured, **fields: Any) -> Output:
    sampling = Sampling(**{"max_tokens": 200, "temperature": 1.0, "seed": 1, "structured": structured, **fields})
    return generate(llm, [PROMPT], sampling)[0]


# ── generated schemas ─────────────────────────────────────────────────────────────────────────────────────


class Schemas:
    """Random schemas of what is supported, each with at least one short text."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def any(self, depth: int) -> dict[str, Any]:
        kinds: list[Callable[[int], dict[str, Any]]] = [
            self.integer,
            self.number,
            self.string,
            self.enum,
            self.boolean,
            self.formatted,
        ]
        if depth:
            kinds += [self.object, self.object, self.object, self.array, self.array, self.union, self.both]
        return self.rng.choice(kinds)(depth - 1)

    def integer(self, _: int) -> dict[str, Any]:
        low = self.rng.randint(-1000, 1000)
        bounds = {"minimum": low, "maximum": low + self.rng.randint(0, 500)}
        return {"type": "integer", **dict(self.rng.sample(sorted(bounds.items()), self.rng.randint(0, 2)))}

    def number(self, _: int) -> dict[str, Any]:
        low = round(self.rng.uniform(-5, 5), 2)
        high = round(low + self.rng.uniform(0.5, 5), 2)
        return self.rng.choice(
            [
                {"type": "number", "minimum": low, "maximum": high},
                {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high},
                {"type": "integer", "multipleOf": self.rng.randint(2, 9)},
            ]
        )

    def string(self, _: int) -> dict[str, Any]:
        least = self.rng.randint(0, 3)
        return self.rng.choice(
            [
                {"type": "string", "minLength": least, "maxLength": least + self.rng.randint(0, 8)},
                {
                    "type": "string",
                    "pattern": self.rng.choice(["^[a-z]{2,5}$", "^\\d{3}-[A-F]+$", "^(é|ü){1,3}x?$"]),
                },
            ]
        )

    def formatted(self, _: int) -> dict[str, Any]:
        return {"type": "string", "format": self.rng.choice(["date", "ipv4", "uuid", "email"])}

    def boolean(self, _: int) -> dict[str, Any]:
        return {"type": self.rng.choice(["boolean", "null", ["boolean", "null"]])}

    def enum(self, _: int) -> dict[str, Any]:
        values = ["red", "green", 7, -1.5, None, True, 'naïve "quote"', [1, 2], {"k": "v"}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 5))}

    def array(self, depth: int) -> dict[str, Any]:
        least = self.rng.randint(0, 2)
        made: dict[str, Any] = {
            "type": "array",
            "items": self.any(depth),
            "maxItems": least + self.rng.randint(0, 2),
        }
        if self.rng.random() < 0.3:
            made["prefixItems"] = [self.any(0)]
        return made | ({"minItems": least} if least else {})

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(["id", "name", "größe", "tags", "a b", 'x"y', "n"], self.rng.randint(0, 4))
        made: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self.rng.random() < 0.6],
            "additionalProperties": False,
        }
        if self.rng.random() < 0.15:
            made["additionalProperties"] = {"type": "boolean"}
            made["maxProperties"] = len(names) + 1
            made["required"] = names
        return made

    def union(self, depth: int) -> dict[str, Any]:
        if self.rng.random() < 0.5:
            return {"oneOf": [self.integer(0), self.string(0), {"type": "array", "maxItems": 0}]}
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randint(1, 3))]}

    def both(self, depth: int) -> dict[str, Any]:
        inner = self.any(depth)
        return {"$ref": "#/$defs/part", "$defs": {"part": inner}} if depth < 0 else {"allOf": [inner]}


def check_schemas(llm: LLM, schemas: list[Any], whitespace: str | None, seed: int) -> tuple[int, int]:
    """Every answer that was not cut is JSON that fits; how many were whole, and how many cut."""
    sampling = [
        Sampling(max_tokens=120, temperature=1.0, seed=seed + number, structured=json_of(value, whitespace))
        for number, value in enumerate(schemas)
    ]
    whole = cut = 0
    for value, output in zip(schemas, generate(llm, [PROMPT] * len(schemas), sampling), strict=True):
        assert output.error is None, (value, output.error)
        if output.finish_reason == "length":
            cut += 1
            continue
        assert output.finish_reason == "stop"
        assert output.text is not None
        reader = jsonschema.Draft202012Validator(value, format_checker=FORMATS)
        reader.validate(json.loads(output.text))
        whole += 1
    return whole, cut


@pytest.mark.parametrize(("whitespace", "share"), [("", 0.7), (None, 0.4)], ids=["compact", "spaced"])
def test_every_whole_answer_fits_its_generated_schema(llm: LLM, whitespace: str | None, share: float) -> None:
    """25 schemas each in CI, 500 each and others by night. Those cut by max_tokens do not count."""
    rng = random.Random(f"{EFFORT} {time.time() if EFFORT > 1 else 1}")
    schemas = [Schemas(rng).any(2) for _ in range(times(25, 500))]
    whole, cut = check_schemas(llm, schemas, whitespace, rng.randrange(1000))
    assert whole + cut == len(schemas)
    assert whole >= share * len(schemas)


# ── every kind ────────────────────────────────────────────────────────────────────────────────────────────

SUMS = 'start: sum\nsum: NUMBER (("+" | "*") NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'
CLOSED = {"additionalProperties": False}
CALL = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], **CLOSED}
TAGS = Structured(
    "structural_tag",
    json.dumps(
        {
            "structures": [{"begin": "<tool_call>", "schema": CALL, "end": "</tool_call>"}],
            "triggers": ["<tool_call>"],
        }
    ),
    "",
)
KINDS: dict[str, Structured] = {
    "schema": json_of(
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"], **CLOSED}
    ),
    "object": json_of({"type": "object", "maxProperties": 1}, None),
    "regex": Structured("regex", r"[A-Z][a-z]{2,12} \d{1,3}%"),
    "choice": Structured("choice", json.dumps(["Paris", "Paris, of course", "Rome"])),
    "grammar": Structured("grammar", SUMS),
    "tag": TAGS,
}


def fits(kind: str, text: str) -> bool:
    match kind:
        case "schema" | "object":
            value = json.loads(text)
            return isinstance(value, dict) and (kind == "object" or isinstance(value["a"], str))
        case "regex":
            return bool(re.fullmatch(KINDS["regex"].text, text))
        case "choice":
            return text in json.loads(KINDS["choice"].text)
        case "grammar":
            return bool(re.fullmatch(r"[1-9]\d?([+*][1-9]\d?){1,3}", text))
        case _:
            calls = re.findall("<tool_call>(.*?)</tool_call>", text)
            return text.count("<tool_call>") == len(calls) and all(
                re.fullmatch('{"city":"(Paris|Rome)"}', call) for call in calls
            )


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_by_itself_fits_for_every_kind(llm: LLM, kind: str) -> None:
    soon = {2041: 5.0}  # where it may end, it does before long
    sampling = [
        Sampling(max_tokens=100, temperature=1.0, seed=seed, structured=KINDS[kind], logit_bias=soon)
        for seed in range(times(4, 60))
    ]
    outputs = generate(llm, [PROMPT] * len(sampling), sampling)
    whole = [output.text or "" for output in outputs if output.finish_reason == "stop"]
    assert whole
    assert all(fits(kind, text) for text in whole), whole


def test_a_tag_that_is_begun_is_completed(llm: LLM) -> None:
    """The model is pushed to begin one wherever it may, and wanders off as soon as it is free again."""
    (trigger,) = llm.tokenizer.encode("<tool_call>", add_special_tokens=False)
    output = ask(llm, TAGS, logit_bias={trigger: 100.0}, max_tokens=100)
    assert output.text is not None
    calls = output.text.split("<tool_call>")
    assert calls[0] == ""
    assert len(calls) > 3
    assert all(re.fullmatch('{"city":"(Paris|Rome)"}</tool_call>', call) for call in calls[1:-1])


# ── with the other fields ─────────────────────────────────────────────────────────────────────────────────


def test_a_text_that_must_end_ends_below_min_tokens_and_one_that_may_goes_on(llm: LLM) -> None:
    short = ask(llm, Structured("regex", "a{3}"), min_tokens=50)
    assert (short.text, short.finish_reason) == ("aaa", "stop")
    long = ask(llm, Structured("regex", "(a|b){1,200}"), min_tokens=20, logit_bias={2041: 100.0, 2039: 100.0})
    assert long.finish_reason == "stop"
    assert len(long.token_ids) == 20


def test_ignore_eos_goes_on_as_long_as_the_grammar_does(llm: LLM) -> None:
    output = ask(llm, Structured("regex", "a{1,7}"), ignore_eos=True, logit_bias={2041: 100.0})
    assert (output.text, output.finish_reason) == ("a" * 7, "stop")


def test_a_stop_id_ends_the_text_only_where_it_may_end(llm: LLM) -> None:
    (letter,) = llm.tokenizer.encode("b", add_special_tokens=False)
    output = ask(llm, Structured("regex", "[ab]c[ab]*"), stop_token_ids=(letter,), logit_bias={letter: 100.0})
    assert (output.text, output.stop_token_id) == ("ac", letter)


def test_penalties_and_bias_choose_among_what_is_allowed(llm: LLM) -> None:
    rome, paris = (llm.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Rome", "Paris"))
    for liked, word in ((rome, "Rome"), (paris, "Paris")):
        output = ask(llm, Structured("choice", '["Paris","Rome"]'), logit_bias={liked: 100.0}, temperature=0.0)
        assert output.text == word
    varied = ask(llm, Structured("regex", "[a-z]{20}"), frequency_penalty=2.0, temperature=0.0)
    assert len(set(varied.text or "")) > 5


def test_log_probabilities_are_those_without_the_grammar(llm: LLM) -> None:
    free = generate(llm, [PROMPT], Sampling(max_tokens=1, temperature=0.0, logprobs=2))[0]
    bound_ = ask(llm, Structured("choice", '["zzz"]'), logprobs=2, temperature=0.0)
    assert free.logprobs is not None
    assert bound_.logprobs is not None
    assert bound_.logprobs[0].top == free.logprobs[0].top
    assert bound_.logprobs[0].logprob < free.logprobs[0].logprob


def test_neighbours_without_a_grammar_get_what_they_get_alone(llm: LLM) -> None:
    free = Sampling(max_tokens=20, temperature=1.0, seed=5)
    (alone,) = generate(llm, [PROMPT], free)
    bound_ = Sampling(max_tokens=20, temperature=1.0, seed=6, structured=KINDS["regex"])
    mixed = generate(llm, [PROMPT] * 5, [bound_, free, bound_, free, bound_])
    assert mixed[1].token_ids == mixed[3].token_ids == alone.token_ids
    assert mixed[0].token_ids == mixed[2].token_ids == mixed[4].token_ids


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_rows_may_draw_a_few_at_a_time(llm: LLM, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Where memory for logits is dear: grammar, log-probabilities and seed of a row stay its own."""
    free = Sampling(max_tokens=12, temperature=1.0, seed=5)
    asked = [
        Sampling(max_tokens=12, temperature=1.0, seed=6, structured=KINDS["regex"]),
        free,
        Sampling(max_tokens=12, temperature=0.0, logprobs=2),
        Sampling(max_tokens=12, temperature=1.0, seed=7, structured=KINDS["choice"], logprobs=1),
        Sampling(max_tokens=12, temperature=0.0),
    ]
    expected = generate(llm, [PROMPT] * 5, asked)
    assert len({tuple(output.token_ids) for output in expected}) == 4
    assert [bool(output.logprobs) for output in expected] == [False, False, True, True, False]
    monkeypatch.setattr(llm.engine.runner, "head_rows", at_once)
    assert generate(llm, [PROMPT] * 5, asked) == expected


# ── under every schedule ──────────────────────────────────────────────────────────────────────────────────

MIXED = [
    *KINDS.values(),
    Structured("regex", "[a-m]{5,60}"),
    json_of({"type": "array", "items": {"type": "integer"}}),
]
GREEDY = [Sampling(max_tokens=24, temperature=0.0, structured=each) for each in MIXED]
BALLAST = [Sampling(max_tokens=50, temperature=0.0, ignore_eos=True)] * 4


@pytest.fixture(scope="module")
def alone(llm: LLM) -> tuple[list[list[int]], list[Output]]:
    """Prompts, and what each gives by itself."""
    prompts = [llm.tokenizer.encode(f"{PROMPT}{number}") for number in range(len(MIXED))]
    return prompts, [generate(llm, [p], sampling)[0] for p, sampling in zip(prompts, GREEDY, strict=True)]


@pytest.mark.parametrize(
    ("ahead", "preempted", "chunk"),
    [
        pytest.param(*way, marks=() if way[2] == 16 else pytest.mark.nightly)
        for way in itertools.product([False, True], [False, True], [16, 64])
    ],
)
def test_the_same_tokens_ahead_or_not_preempted_or_not(
    alone: tuple[list[list[int]], list[Output]], ahead: bool, preempted: bool, chunk: int
) -> None:
    prompts, expected = alone
    other = LLM(
        "builtin://tiny",
        dtype="float32",
        threads=1,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=chunk,
        block_size=1 if preempted else 16,
        num_blocks=150 if preempted else None,
        async_scheduling=ahead,
    )
    ballast = [[5], [6], [7], [8]] if preempted else []
    outputs = generate(other, ballast + prompts, [*BALLAST[: len(ballast)], *GREEDY])[len(ballast) :]
    for output, reference in zip(outputs, expected, strict=True):
        assert output.token_ids == reference.token_ids
        assert (output.finish_reason, output.text) == (reference.finish_reason, reference.text)
    assert bool(other.engine.stats().preemptions) == preempted
    other.engine.check_integrity()


def test_a_step_that_is_tried_again_in_parts_gives_the_same_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [llm.tokenizer.encode(PROMPT)] * 4
    expected = [output.token_ids for output in generate(llm, prompts, GREEDY[:4])]
    execute = llm.engine.runner.execute
    failures = 0

    def failing(plan: StepPlan) -> StepResult:
        nonlocal failures
        result = execute(plan)  # the matchers have moved on by then
        if len(plan.items) > 1:
            failures += 1
            raise RuntimeError("after the fact")
        return result

    monkeypatch.setattr(llm.engine.runner, "execute", failing)
    assert [output.token_ids for output in generate(llm, prompts, GREEDY[:4])] == expected
    assert failures > 3


def test_a_request_whose_grammar_and_fields_leave_nothing_fails_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself rules out the only token: no answer is better than a wrong one."""
    (letter,) = llm.tokenizer.encode("q", add_special_tokens=False)
    logits = llm.engine.runner.model.logits  # type: ignore[attr-defined]

    def without(states: Tensor) -> Tensor:
        made: Tensor = logits(states)
        made[:, letter] = float("-inf")
        return made

    monkeypatch.setattr(llm.engine.runner.model, "logits", without)  # type: ignore[attr-defined]
    only = Sampling(max_tokens=5, temperature=1.0, structured=Structured("regex", "q"))
    other = Sampling(max_tokens=5, temperature=1.0, structured=Structured("regex", "[a-c]{3}"))
    stuck, fine = generate(llm, [PROMPT] * 2, [only, other])
    assert stuck.finish_reason == "error"
    assert stuck.error is not None
    assert "leaves no token" in stuck.error
    assert re.fullmatch("[a-c]{3}", fine.text or "")


def test_structured_outputs_of_sampling_params(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=20, temperature=0.0, structured_outputs={"choice": ["tea", "coffee"]}, n=2)
    (output,) = llm.generate([PROMPT], asked, use_tqdm=False)
    assert {made.text for made in output.outputs} <= {"tea", "coffee"}
    for wrong, words in (
        ({}, "exactly one"),
        ({"regx": "a"}, "structured_outputs.regx"),
        ({"json": 3}, "JSON Schema"),
    ):
        with pytest.raises(ValueError, match=words):
            SamplingParams(structured_outputs=wrong)
    with pytest.raises(RequestRefused, match="look-around"):
        llm.generate([PROMPT], SamplingParams(structured_outputs={"regex": "(?=a)"}), use_tqdm=False)
    assert not llm.engine.has_work


def test_a_refused_constraint_leaves_no_trace_in_the_engine() -> None:
    engine = Engine.load(tiny_spec())
    for _ in range(2):
        with pytest.raises(RequestRefused, match='not supported in a schema: "not"'):
            engine.add(Generate("r", [1, 2], Sampling(max_tokens=3, structured=json_of({"not": {}}))))
    assert not engine.has_work
    engine.check_integrity()


# ── served ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_constraint_goes_through_the_socket_and_a_wrong_one_is_the_requests_own_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Why it is refused quotes it, so that stands in the answer and not in the log."""
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(
            Generate("good", [5, 6], Sampling(max_tokens=40, structured=Structured("regex", "(ab){2}"))),
            Generate("bad", [5, 6], Sampling(max_tokens=40, structured=Structured("regex", "(CANARY"))),
            Generate("free", [5, 6], Sampling(max_tokens=3, ignore_eos=True)),
        )
        heard = await client.hear("good", "bad", "free")
        (refused,) = heard["bad"]
        assert (refused.finish_reason, refused.error_code) == ("error", "invalid_grammar")
        assert refused.error is not None
        assert "unclosed group" in refused.error
        assert "CANARY" in refused.error
        assert "bad ended: invalid_grammar" in caplog.text
        assert "CANARY" not in caplog.text
        assert heard["good"][-1].finish_reason == "stop"
        assert heard["free"][-1].finish_reason == "length"
        assert (await until_idle(client)).blocks_used == 0
        client.close()


async def test_what_is_aborted_while_it_is_compiled_never_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_in(folder)
    gate = threading.Event()
    attempt = grammar_module.Grammars._attempt

    def later(self: grammar_module.Grammars, *asked: Any) -> None:
        gate.wait(10)
        attempt(self, *asked)

    monkeypatch.setattr(grammar_module.Grammars, "_attempt", later)
    async with serving(spec):
        client = await greeted(spec)
        one = Sampling(max_tokens=5, structured=Structured("regex", "a{2}"))
        client.send(Generate("gone", [5], one), Generate("stays", [5], one), Abort("gone"))
        client.send(Generate("free", [5], Sampling(max_tokens=3, ignore_eos=True)))
        heard = await client.hear("free")  # which did not wait
        assert set(heard) == {"free"}
        client.send(GetStats())
        while (told := await client.next(Stats)).running:
            client.send(GetStats())
        assert (told.waiting, told.deferred) == (1, 1), "its constraint is not there yet"
        assert told.cpu_seconds > 0
        assert told.resident_bytes > 1 << 20
        gate.set()
        assert set(await client.hear("stays")) == {"stays"}
        assert (await until_idle(client)).steps > 0
        client.close()


async def gaps(client: Client, name: str, send: list[Generate], until: int) -> list[float]:
    """Seconds between the tokens of a stream, while others are sent."""
    found: list[float] = []
    last: float | None = None
    while len(found) < until:
        message = await client.next(Deltas)
        now = time.monotonic()
        if any(delta.id == name and delta.token_ids for delta in message.items):
            if last is not None:
                found.append(now - last)
            last = now
            if send:
                client.send(send.pop())
    return sorted(found)


async def test_hostile_constraints_do_not_slow_down_a_stream_beside_them(folder: Path) -> None:
    from tests.unit.engine.test_grammar import COSTLY, HOSTILE

    spec = spec_in(folder, max_model_len=2048, num_blocks=256)
    hostile = [
        Generate(f"h{number}", [5], Sampling(max_tokens=times(60, 200), temperature=1.0, structured=structured))
        for number, structured in enumerate([*HOSTILE.values(), *COSTLY.values()])
        if len(structured.text) < 2**16
    ]
    stream = Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("before", [5], stream))
        alone = await gaps(client, "before", [], times(60, 200))
        client.send(Abort("before"), Generate("beside", [5], stream))
        beside = await gaps(client, "beside", hostile, times(60, 300))
        client.send(Abort("beside"))
        assert not hostile, "all were sent"
        p99 = [each[int(0.99 * len(each))] for each in (alone, beside)]
        print(f"p50 {alone[len(alone) // 2]:.4f} {beside[len(beside) // 2]:.4f}, p99 {p99}, max {beside[-1]:.3f}")
        assert beside[-1] < bound(0.25)
        await until_idle(client)
        client.close()
