"""The arithmetic of `platform bench`, against numbers worked out by hand, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench import BadFile, BadSetting, figures, lengths, report, schedule, work
from quire.bench.lengths import Lengths
from quire.bench.load import Measured, Row, latencies
from quire.bench.prompts import FIRST, Vocabulary, learn
from quire.cli.program import run


def row(index: int = 0, **fields: object) -> Row:
    found = Row(index, due=0.0, sent=0.0, input_asked=10, output_asked=3)
    for name, value in {"e2e": 1.0, "input_tokens": 10, "output_tokens": 3, **fields}.items():
        setattr(found, name, value)
    return found


# ── lengths and schedules ─────────────────────────────────────────────────────────────────────────────────


def test_lengths_have_their_distribution() -> None:
    rng = random.Random(1)
    assert {lengths.parse("256").draw(rng) for _ in range(10)} == {256}
    drawn = [lengths.parse("uniform:10:20").draw(rng) for _ in range(5000)]
    assert (min(drawn), max(drawn)) == (10, 20)
    assert statistics.mean(drawn) == pytest.approx(15, rel=0.02)
    drawn = [lengths.parse("lognormal:200:0.5").draw(rng) for _ in range(5000)]
    assert statistics.median(drawn) == pytest.approx(200, rel=0.05)
    assert statistics.stdev(map(math.log, drawn)) == pytest.approx(0.5, rel=0.05)
    assert min(lengths.parse("lognormal:1:3").draw(rng) for _ in range(500)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "uniform:9", "uniform:9:3", "uniform:0:3", "normal:1:2", "lognormal:3:x", "1:2:3:4",
     "lognormal:3:nan", "99999999999"],
)  # fmt: skip
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(BadSetting) as told:
        lengths.parse(text)
    assert "uniform:64:512" in (told.value.hint or "")


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    arrivals = list(itertools.islice(schedule.poisson(50, "a"), 5000))
    assert arrivals == list(itertools.islice(schedule.poisson(50, "a"), 5000))
    assert arrivals != list(itertools.islice(schedule.poisson(50, "b"), 5000))
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.07), "of an exponential they are the same"
    assert list(itertools.islice(schedule.poisson(math.inf, "a"), 3)) == [0, 0, 0]
    assert list(schedule.until(iter([0.0, 0.5, 1.0, 0.2]), 1.0)) == [0.0, 0.5]


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────


def test_percentiles_are_on_the_line_between_values() -> None:
    ten = [float(value) for value in range(1, 11)]
    assert figures.percentile(ten, 50) == 5.5
    assert figures.percentile(ten, 90) == pytest.approx(9.1)
    assert figures.percentile(ten, 99) == pytest.approx(9.91)
    assert (figures.percentile(ten, 0), figures.percentile(ten, 100), figures.percentile([7.0], 99)) == (1, 10, 7)
    assert figures.spread([4.0, 1.0, 2.0, 5.0]) == {"mean": 3.0, "p50": 3.0, "p90": 4.7, "p99": 4.97, "max": 5.0}
    assert figures.spread([]) is None


@pytest.mark.parametrize(
    ("arrivals", "tokens", "expected"),
    [
        ([(0.0, 1), (0.3, 4), (0.4, 5)], None, [0.1, 0.1, 0.1, 0.1]),  # three tokens in 0.3 s, one in 0.1 s
        ([(0.0, 2), (0.5, 2), (0.6, 4)], None, [0.3, 0.3]),  # text that was kept back is part of what follows
        ([(0.0, 1), (0.3, 0), (0.4, 0)], 6, [0.15, 0.05]),  # two tokens an arrival, by the mean
        ([(1.0, 1)], None, []),
        ([(1.0, 1)], 1, []),
    ],
)
def test_the_time_between_arrivals_is_divided_by_their_tokens(
    arrivals: list[tuple[float, int]], tokens: int | None, expected: list[float]
) -> None:
    assert latencies(arrivals, tokens) == pytest.approx(expected)


def test_time_per_output_token_is_of_those_behind_the_first() -> None:
    assert row(ttft=0.4, last=1.0, output_tokens=4).tpot == pytest.approx(0.2)
    assert row(ttft=0.4, last=0.4, output_tokens=1).tpot is None
    assert row(output_tokens=4).tpot is None


def test_goodput_counts_what_is_within_all_bounds() -> None:
    assert figures.parse_bounds("ttft:500ms, itl:50ms,e2e:5s") == {"ttft": 0.5, "itl": 0.05, "e2e": 5.0}
    bounds = {"ttft": 0.5, "itl": 0.05, "tpot": 0.2, "e2e": 2.0}
    good = row(ttft=0.5, last=0.9, itl=[0.05, 0.05])
    assert figures.meets(good, bounds)
    assert figures.meets(row(ttft=0.5, last=0.5, output_tokens=1), bounds), "no time between tokens is too long"
    for bad in (
        row(ttft=0.51, last=0.9, itl=[0.05]),
        row(ttft=0.5, last=0.9, itl=[0.04, 0.06]),
        row(ttft=0.5, last=1.0, itl=[0.05]),
        row(ttft=0.5, last=0.9, e2e=2.1),
        row(),
        row(ttft=0.1, last=0.1, error="timeout"),
    ):
        assert not figures.meets(bad, bounds)
    slow_once = row(ttft=0.5, itl=[*[0.01] * 1000, 9.0])
    assert figures.meets(slow_once, {"itl": 0.05}), "of a request's own times between tokens, 99 % count"
    measured = Measured([good, row(1, ttft=9.0), row(2, error="timeout")], 2.0, 0.5, 0.0)
    found = figures.summary(measured, {"ttft": 0.5})
    assert found["goodput"] == {"requestsPerSecond": 0.5, "share": 0.333333}


@pytest.mark.parametrize("text", ["", "ttft", "ttft:5", "speed:1s", "ttft:1s,ttft:2s", "ttft:1s,"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(BadSetting):
        figures.parse_bounds(text)


def test_the_figures_of_a_run_are_those_of_its_answers() -> None:
    rows = [
        row(0, ttft=0.1, last=0.5, e2e=0.5, itl=[0.2, 0.2], cached_tokens=4),
        row(1, ttft=0.3, last=0.9, e2e=1.0, itl=[0.3, 0.3], output_tokens=5),
        row(2, e2e=9.0, error="429 rate_limit", message="slow down"),
        row(3, e2e=9.0, error="cut off", message="first"),
        row(4, e2e=9.0, error="cut off", message="second"),
    ]
    rows[4].due, rows[4].sent = 1.0, 1.25
    found = figures.summary(Measured(rows, 4.0, 1.0, 0.0, unfinished=2), {})
    assert (found["requests"], found["answered"], found["failed"], found["unfinished"]) == (5, 2, 3, 2)
    assert (found["inputTokens"], found["outputTokens"], found["cachedTokens"]) == (20, 8, 4)
    assert (found["inputTokensAsked"], found["outputTokensAsked"]) == (20, 6)
    assert (found["requestsPerSecond"], found["outputTokensPerSecond"], found["totalTokensPerSecond"]) == (
        0.5,
        2,
        7,
    )
    assert found["ttft"]["mean"] == pytest.approx(0.2)
    assert found["itl"]["p50"] == pytest.approx(0.25)
    assert found["e2e"]["max"] == 1.0, "an error took no time to be answered"
    assert found["lateness"]["max"] == 0.25
    assert found["clientCpu"] == 0.25
    assert found["goodput"] is None
    assert found["errors"] == [
        {"kind": "cut off", "count": 2, "message": "first"},
        {"kind": "429 rate_limit", "count": 1, "message": "slow down"},
    ]
    lines = report.lines(
        {"runs": [{**found, "load": "rate 2", "concurrency": None}], "parameters": {"goodput": {}}}
    )
    text = "\n".join(lines)
    for words in (
        "rate 2: 5 requests in 4.00 s, 2 answered, 3 failed, 2 cut by the interruption",
        "0.50 requests/s, 2.0 output tokens/s, 7.0 tokens/s in all",
        "Failed      2 × cut off: first",
        "the client sent 1 % of the requests 240 ms or more behind the schedule",
        "answers came to 133% of the tokens that were asked for",
    ):
        assert words in text


def test_a_comparison_has_ratios_and_says_what_is_not_alike() -> None:
    def result(load: str, speed: float, seed: int) -> dict[str, object]:
        measured = Measured([row(ttft=1 / speed, last=0.5, itl=[0.1])], 1 / speed, 0.0, 0.0)
        run = {**figures.summary(measured, {}), "load": load}
        return {
            "model": "m",
            "parameters": {"seed": seed, "requests": 1},
            "runs": [run, {**run, "load": f"only {seed}"}],
        }

    compared = report.compare(result("rate 2", 1.0, 1), result("rate 2", 4.0, 2))
    assert compared["differences"] == [{"name": "seed", "a": 1, "b": 2}]
    assert (compared["onlyA"], compared["onlyB"]) == (["only 1"], ["only 2"])
    ratios = {found["name"]: found["ratio"] for found in compared["runs"][0]["figures"]}
    assert ratios["requestsPerSecond"] == 4
    assert ratios["ttft p90"] == 0.25
    text = "\n".join(report.comparison_lines(compared))
    assert "×0.25" in text
    assert "not alike: seed is 1 in A and 2 in B" in text


# ── prompts and files ─────────────────────────────────────────────────────────────────────────────────────


async def test_prompts_come_to_the_tokens_that_were_asked_for() -> None:
    def tokens(text: str) -> int:
        return 9 + sum(len(word) // 3 for word in text.split(" "))

    asked: list[str] = []

    async def count(text: str) -> int:
        asked.append(text)
        return tokens(text)

    vocabulary = await learn(count)
    assert vocabulary.overhead == tokens(FIRST) == 10
    rng = random.Random(3)
    for wanted in (10, 11, 12, 50, 333, 4000):
        assert tokens(vocabulary.prompt(wanted, rng)) == wanted
    assert tokens(vocabulary.prompt(3, rng)) == 10, "no prompt is shorter than the shortest"
    assert len({vocabulary.prompt(40, rng) for _ in range(50)}) == 50
    shared = vocabulary.text(20, rng)
    two = [vocabulary.prompt(60, rng, shared, 20) for _ in range(2)]
    assert all(text.startswith(shared) and tokens(text) == 60 for text in two)
    assert two[0] != two[1]


async def test_counts_that_say_nothing_are_refused() -> None:
    async def always(text: str) -> int:
        return 5

    async def fails(text: str) -> int:
        raise BadFile("as it is")

    with pytest.raises(BadSetting, match="do not grow by the words"):
        await learn(always)
    with pytest.raises(BadFile, match="as it is"):
        await learn(fails)


@given(st.integers(0, 500), st.integers(0, 100))
def test_no_text_is_longer_than_asked(tokens: int, seed: int) -> None:
    vocabulary = Vocabulary(3, {"aa": 2, "bbb": 3, "ccccc": 5})
    text = vocabulary.text(tokens, random.Random(seed))
    made = sum(vocabulary.costs[word] for word in text.split(" ")[1:])
    assert tokens - 1 <= made <= tokens, "one token is what no word here has"


def test_runs_have_the_same_lengths_and_other_words() -> None:
    vocabulary = Vocabulary(1, {"a": 1, "b": 1, "c": 2})
    form = work.Form("m", "chat", streams=True, counts_tokens=True, ignores_eos=True, more={"top_k": 1})

    def requests(run: str, seed: int = 7) -> list[work.Request]:
        sizes = work.drawn_sizes(Lengths("uniform", 5, 90), Lengths("fixed", 4), 10, seed)
        return list(itertools.islice(work.made(sizes, vocabulary, form, 10, seed, run), 20))

    one, other = requests("run 0"), requests("run 1")
    assert requests("run 0") == one
    assert [each.size for each in one] == [each.size for each in other]
    assert all(a.body != b.body for a, b in zip(one, other, strict=True))
    assert [each.size for each in requests("run 0", 8)] != [each.size for each in one]
    bodies = [json.loads(each.body) for each in one + other]
    assert {body["messages"][0]["content"][:19] for body in bodies} == {bodies[0]["messages"][0]["content"][:19]}
    assert {**bodies[0], "messages": None} == {
        "model": "m", "messages": None, "max_tokens": 4, "ignore_eos": True, "stream": True, "top_k": 1,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "arrival,input_tokens,output_tokens\n5,10,20\n6.5,11,0\n"),
        ("t.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n5,10,20\n6.5,11,0\n"),
        (
            "t.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:15:46.6805900,10,20\n2023-11-16 18:15:48.1805900,11,0\n",
        ),
        (
            "t.jsonl",
            '{"arrival": 5, "input_tokens": 10, "output_tokens": 20}\n\n'
            '{"arrival": 6.5, "input_tokens": 11, "output_tokens": 0}\n',
        ),
    ],
)  # fmt: skip
def test_traces_of_several_forms_are_read(tmp_path: Path, name: str, text: str) -> None:
    lines = work.read_trace(write(tmp_path, name, text), speed=2)
    assert [line.arrival for line in lines] == pytest.approx([0, 0.75])
    assert [line.size for line in lines] == [work.Size(10, 20), work.Size(11, 1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n", "t.csv:2: it has no arrival"),
        ("t.csv", "arrival,input_tokens,output_tokens\nsoon,1,1\n", "t.csv:2: 'soon' is no time"),
        ("t.csv", "arrival,input_tokens,output_tokens\nnan,1,1\n", "t.csv:2: 'nan' is no time"),
        ("t.csv", "arrival,input_tokens,output_tokens\n1,-1,1\n", "t.csv:2: '-1' is no number of tokens"),
        ("t.csv", "arrival,input_tokens,output_tokens\n2,1,1\n1,1,1\n", "t.csv:3: it arrives before"),
        ("t.csv", "arrival,input_tokens,output_tokens\n", "there is no request"),
        ("t.jsonl", "{\n", "t.jsonl:1: not JSON"),
        ("t.jsonl", "[]\n", "t.jsonl:1: not a JSON object"),
    ],
)
def test_a_trace_that_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(BadFile) as told:
        work.read_trace(write(tmp_path, name, text))
    assert message in told.value.message


def test_data_sets_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = write(tmp_path, "c.jsonl", json.dumps({"messages": turns, "max_tokens": 5}) + "\n")
    assert work.read_dataset(chat, "chat") == [work.DatasetLine(turns[:1], 5)], "the recorded answer is not sent"
    plain = write(tmp_path, "p.jsonl", '{"prompt": "q"}\n')
    assert work.read_dataset(plain, "completions") == [work.DatasetLine("q", None)]
    with pytest.raises(BadFile, match=r"c\.jsonl:1: it has no prompt"):
        work.read_dataset(chat, "completions")
    form = work.Form("m", "completions", streams=False, counts_tokens=False, ignores_eos=False)
    bodies = [
        json.loads(each.body)
        for each in itertools.islice(work.taken(work.read_dataset(plain, "completions"), form, None, 0), 2)
    ]
    assert bodies == [{"model": "m", "prompt": "q"}] * 2


# ── the command line ──────────────────────────────────────────────────────────────────────────────────────

NOWHERE = ("m", "--url", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*NOWHERE, "--save", "no/such/folder.json"), "cannot write"),
        ((*NOWHERE, "--plot", "no/such/folder.png"), "cannot write"),
        ((*NOWHERE, "--rate", "1", "--concurrency", "1"), "exclude each other"),
        ((*NOWHERE, "--rate", "inf", "--duration", "1s"), "sends without end"),
        ((*NOWHERE, "--rate", "0"), "no list of numbers above 0"),
        ((*NOWHERE, "--concurrency", "1.5"), "no list of whole numbers"),
        ((*NOWHERE, "--concurrency", "4,4"), "twice"),
        ((*NOWHERE, "--no-stream", "--goodput", "ttft:1s"), "needs a stream"),
        ((*NOWHERE, "--goodput", "ttft:1"), "is not a duration"),
        ((*NOWHERE, "--input-tokens", "uniform:9:3"), "wrong order"),
        ((*NOWHERE, "--extra-body", '{"stream": false}'), "cannot have stream"),
        ((*NOWHERE, "--extra-body", "1"), "no JSON object"),
        ((*NOWHERE, "--trace", "nothing.csv"), "cannot read nothing.csv"),
        ((*NOWHERE, "--trace", "t.csv", "--output-tokens", "3"), "neither --dataset nor --output-tokens"),
        ((*NOWHERE, "--dataset", "d.jsonl", "--prefix-tokens", "3"), "no meaning with --dataset"),
        ((*NOWHERE, "--speed", "2"), "is for the arrivals of a trace"),
        (("--compare", "t.csv", "t.csv"), "not a saved result"),
        (("m", "--compare", "t.csv", "t.csv"), "model has no meaning with --compare"),
        (("--seed", "0", "--compare", "t.csv", "t.csv"), "--seed has no meaning with --compare"),
        (("--compare", "nothing.json", "t.csv"), "cannot read nothing.json"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_sent(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "t.csv", "arrival,input_tokens,output_tokens\n1,1,1\n")
    assert run(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "\nhint: " in err or "cannot" in message
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"], "nothing is written"
