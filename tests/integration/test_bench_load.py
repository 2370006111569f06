"""The load generator against a server of bytes: what is counted, from when, and what becomes of errors."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
from tests.integration.raw_server import DONE, Answer, Raw, chunked, event, serving, text, usage, whole

from quire.bench import BadSetting
from quire.bench.drive import Demand, Driver, Result, Settings
from quire.bench.lengths import Lengths
from quire.bench.load import Load, Measured
from quire.bench.work import DatasetLine, Request, Size
from quire.remote import Refused, Server

STREAM = chunked([text("a", 1), text("bc", 3), event({"choices": [], "usage": usage(3)}), DONE])


def requests(count: int | None = None) -> Any:
    return itertools.islice((Request(index, b"{}", Size(7, 3)) for index in itertools.count()), count)


async def measure(answer: Answer, run: Any, **options: Any) -> tuple[Measured, Raw]:
    async with serving(answer) as raw:
        server = Server(raw.url, timeout=options.pop("timeout", 10))
        settings = {"streams": True, "counts_tokens": True, "stop": asyncio.Event(), **options}
        measured: Measured = await run(Load(server, "/chat/completions", **settings))
        server.close()
    return measured, raw


async def streaming(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
    writer.write(STREAM)


async def test_a_closed_loop_has_so_many_on_the_way() -> None:
    now, most = 0, 0

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        writer.write(STREAM)

    measured, raw = await measure(answer, lambda load: load.closed(requests(12), 4, None))
    assert (most, len(raw.asked), raw.connections) == (4, 12, 4)
    assert [row.index for row in measured.rows] == list(range(12))
    assert all(row.error is None and (row.input_tokens, row.output_tokens) == (7, 3) for row in measured.rows)
    assert all(row.due == row.sent for row in measured.rows)
    assert 0.06 <= measured.seconds < 1
    measured, _ = await measure(answer, lambda load: load.closed(requests(), 2, 0.1))
    assert 4 <= len(measured.rows) <= 12
    assert all(row.sent < 0.1 for row in measured.rows)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def one_by_one(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        async with turn:
            await asyncio.sleep(0.1)
        writer.write(STREAM)

    turn = asyncio.Lock()
    due = [0.0, 0.01, 0.02, 0.03]
    measured, _ = await measure(one_by_one, lambda load: load.open(zip(due, requests(), strict=False)))
    assert [row.due for row in measured.rows] == due
    assert all(row.sent - row.due < 0.09 for row in measured.rows), "sent without waiting for the one before"
    waits = [row.e2e or 0 for row in measured.rows]
    assert waits == sorted(waits)
    assert waits[-1] > 0.35


async def test_what_a_client_sends_late_counts_from_when_it_was_due() -> None:
    stalled = False

    def stall(ended: int) -> None:
        nonlocal stalled
        if not stalled:
            stalled = True
            time.sleep(0.3)

    due = [0.0, 0.1, 0.2]
    measured, _ = await measure(
        streaming, lambda load: load.open(zip(due, requests(), strict=False)), progress=stall
    )
    late = [row.sent - row.due for row in measured.rows]
    assert late[0] < 0.09
    assert late[1] > 0.15
    assert all((row.ttft or 0) > 0.15 for row in measured.rows[1:2]), "the wait is in the latency"


async def test_errors_are_counted_by_kind_and_the_rest_goes_on() -> None:
    answers = [
        STREAM,
        whole(b'{"error": {"message": "slow down", "code": "queue_full"}}', 429),
        chunked([text("a", 1), event({"error": {"message": "gone", "code": "engine_died"}})]),
        chunked([text("a", 1), event({"choices": [], "usage": usage(1)})]),
        chunked([text("a"), DONE]),
        chunked([text("a", 1)], end=False),
        chunked([b"data: {\n\n"]),
        b"",
    ]

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        mine = answers[len(raw.asked) - 1]
        if mine:
            writer.write(mine)
            await writer.drain()
            if not mine.endswith(b"\r\n\r\n") and b" 429 " not in mine:
                writer.close()
        else:
            await asyncio.sleep(0.5)

    measured, _ = await measure(answer, lambda load: load.closed(requests(8), 1, None), timeout=0.3)
    assert [row.error for row in measured.rows] == [
        None, "429 queue_full", "stream error engine_died", "cut off", "no usage", "connection lost",
        "unreadable answer", "timeout",
    ]  # fmt: skip
    assert measured.rows[1].message == "slow down"


async def test_tokens_of_one_read_came_together() -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(chunked([text("a", 1), text("b", 2)], end=False))
        await writer.drain()
        await asyncio.sleep(0.2)
        tail = chunked([text("c", 3), text("d", 4), event({"choices": [], "usage": usage(4)}), DONE])
        writer.write(tail.partition(b"\r\n\r\n")[2])

    for counts, expected in ((True, [0.1, 0.1]), (False, [0.1])):
        measured, _ = await measure(answer, lambda load: load.closed(requests(1), 1, None), counts_tokens=counts)
        (row,) = measured.rows
        assert row.itl == pytest.approx(expected, abs=0.05)
        assert row.tpot == pytest.approx(0.2 / 3, abs=0.03)
        assert row.ttft is not None
        assert row.ttft < 0.15


async def test_an_interruption_keeps_what_was_measured_and_aborts_the_rest() -> None:
    stop = asyncio.Event()

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        if len(raw.asked) > 3:
            if len(raw.asked) == 5:
                stop.set()
            await asyncio.sleep(0.2)
        writer.write(STREAM)

    for run in (
        lambda load: load.closed(requests(), 2, None),
        lambda load: load.open(zip(itertools.chain([0, 0, 0, 0.05, 0.05], itertools.repeat(99)), requests())),  # noqa: B905
    ):
        stop.clear()
        measured, _ = await measure(answer, run, stop=stop)
        assert [row.error for row in measured.rows] == [None] * 3
        assert measured.unfinished == 2


# ── what is found out before ──────────────────────────────────────────────────────────────────────────────


async def drive(answer: Answer, **settings: Any) -> tuple[Result, Raw]:
    given = {"inputs": Lengths("fixed", 12), "outputs": Lengths("fixed", 3), "ignores_eos": True, **settings}
    async with serving(answer) as raw:
        server = Server(raw.url, timeout=10)
        try:
            driver = Driver(
                server, Settings("m", (Demand("concurrency", 2),), requests=4, **given), asyncio.Event()
            )
            await driver.prepare()
            return await driver.drive(), raw
        finally:
            server.close()


def by_words(*, counts: bool, refuses: bool = False, reports: bool = True) -> Answer:
    """A server whose tokens are words, and 5 for the template."""

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        spent = usage(3, 5 + len(body["messages"][0]["content"].split())) if reports else None
        if not body.get("stream"):
            writer.write(whole(event({"choices": [], "usage": spent})[6:-2]))
        elif refuses and "continuous_usage_stats" in body["stream_options"]:
            writer.write(whole(b'{"error": {"message": "unknown field"}}', 400))
        else:
            end = [event({"choices": [], "usage": spent}), DONE]
            writer.write(chunked([text("a", 1 if counts else None), text("b", 2 if counts else None), *end]))

    return answer


@pytest.mark.parametrize(
    ("server", "tokens_by"),
    [
        (by_words(counts=True), "usage"),
        (by_words(counts=False), "mean"),
        (by_words(counts=False, refuses=True), "mean"),
    ],
    ids=["counts", "does not count", "refuses to count"],
)
async def test_tokens_of_events_are_known_by_what_the_server_offers(server: Answer, tokens_by: str) -> None:
    result, raw = await drive(server)
    assert result.tokens_by == tokens_by
    (run,) = result.runs
    assert [row.error for row in run.measured.rows] == [None] * 4
    assert [row.input_tokens for row in run.measured.rows] == [12] * 4
    sent = [body for _, body in raw.asked[-4:]]
    assert all(("continuous_usage_stats" in body["stream_options"]) == (tokens_by == "usage") for body in sent)
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] for body in sent)


async def test_a_server_without_usage_is_refused() -> None:
    with pytest.raises(BadSetting, match="does not report usage"):
        await drive(by_words(counts=False, reports=False))


async def test_a_data_set_needs_no_words_of_known_cost() -> None:
    line = DatasetLine([{"role": "user", "content": "as it is"}], 2)
    result, raw = await drive(by_words(counts=True), inputs=None, outputs=None, dataset=(line,), warmup=3)
    assert len(raw.asked) == 1 + 3 + 4, "one to try, to warm up, to measure"
    assert all(body["messages"] == line.content for _, body in raw.asked)
    assert len(result.runs[0].measured.rows) == 4


async def test_a_server_that_refuses_is_an_error_before_anything_is_measured() -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(whole(b'{"error": {"message": "no such model"}}', 404))

    with pytest.raises(Refused, match="no such model"):
        await drive(answer)


async def test_a_server_that_does_not_know_ignore_eos_is_an_error_that_says_how_to_do_without() -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(whole(b'{"error": {"message": "Unrecognized argument: ignore_eos"}}', 400))

    with pytest.raises(Refused) as told:
        await drive(answer)
    assert told.value.hint == "--no-ignore-eos leaves it out"
