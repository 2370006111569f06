"""`platform bench`: load on a served model, and what it makes of it.

Everything that can be wrong with the command line, its files and the server is found before the first request that
counts. Ctrl-C ends the run that is going on; what was measured until then is told, saved and drawn all the same.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli import render
from quire.cli.outcome import CommandFailed, ExitCode, Interrupted, usage_error
from quire.cli.session import notice, seconds
from quire.cli.target import choose, failed, open_server, target_options

if TYPE_CHECKING:
    from quire.bench.drive import Demand, Result, Settings
    from quire.remote import Server

DEFAULT_CONCURRENCY = "8"
DEFAULT_TOKENS = ("256", "128")
MOST_AT_A_TIME = 10_000


@click.command(short_help="Measure throughput and latency of a served model.")
@click.argument("model", required=False)
@target_options
@click.option(
    "--concurrency",
    metavar="N,…",
    help=f"So many requests at a time, a run for each number. Left out, with no --rate: {DEFAULT_CONCURRENCY}.",
)
@click.option(
    "--rate", metavar="R,…", help="So many requests a second at random times, a run for each; inf: at once."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests of a run. Left out: 100, or all of a file.",
)
@click.option(
    "--duration", metavar="DURATION", callback=seconds, help="Send for so long; what is on the way is awaited."
)
@click.option(
    "--input-tokens", metavar="N|DIST", help="Tokens of a prompt: 256, uniform:64:512, lognormal:256:0.8."
)
@click.option("--output-tokens", metavar="N|DIST", help="Tokens of an answer, likewise.")
@click.option(
    "--prefix-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Tokens that begin all prompts."
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CSV or JSONL of arrival, input_tokens, output_tokens. With --concurrency or --rate only lengths.",
)
@click.option("--speed", type=float, metavar="X", help="Arrivals of the trace X times as fast.")
@click.option("--dataset", type=click.Path(path_type=Path), metavar="FILE", help="JSONL of messages, or prompt.")
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("--stream/--no-stream", default=True, show_default=True)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    help="Answers go on to their full length. On, unless a data set is sent without --output-tokens.",
)
@click.option(
    "--extra-body", metavar="JSON", help="Fields that go into every request, such as '{\"temperature\": 0}'."
)
@click.option("--goodput", metavar="BOUNDS", help="Count requests within ttft:500ms,itl:50ms,tpot:40ms,e2e:5s.")
@click.option("--warmup", type=click.IntRange(min=0), default=0, metavar="N", help="Requests before, not counted.")
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="10m", show_default=True, help="Of one answer."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, words and times.")
@click.option("--fail-on-errors", is_flag=True, help="Exit code 6 if any request failed, not only if all did.")
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Write everything as JSON, each request too."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it as a PNG (needs quire[bench])."
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    nargs=2,
    metavar="A B",
    help="Compare two saved results; nothing runs.",
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def bench(
    model: str | None,
    url: str | None,
    api_key: str | None,
    timeout: float,
    fail_on_errors: bool,
    save: Path | None,
    plot: Path | None,
    compare: tuple[Path, Path] | None,
    output: str,
    **load: Any,
) -> int:
    """Send requests to MODEL and measure what comes: throughput, time to first token, between tokens, to the end.

    MODEL may be left out where one is served. Prompts are random words of the wanted number of tokens, other ones
    in each run. With --rate or a trace, times count from when a request was due, sent or not. What each figure
    means: docs/chat-and-bench.md.
    """
    from quire.bench import BenchError
    from quire.remote import RemoteError

    try:
        if compare is not None:
            _check_alone("compare", "output")
            return _compare(*compare, output)
        for path in (save, plot):
            _check_writable(path)
        if plot is not None:
            _check_plotting()
        settings = _settings(Options(**load), timeout)
        server = open_server(url, api_key, timeout)
        result = asyncio.run(_measure(server, model, settings))
    except BenchError as error:
        raise CommandFailed(error.message, error.hint, ExitCode.USAGE) from error
    except RemoteError as error:
        raise failed(error) from error
    return _tell(result, save, plot, output, fail_on_errors)


def _tell(result: Result, save: Path | None, plot: Path | None, output: str, fail_on_errors: bool) -> int:
    from quire.bench import drive, report
    from quire.chat import harmless

    if output == "json":
        render.dump(drive.record(result, with_rows=False), "json", "Bench")
    else:
        for line in report.lines(drive.record(result, with_rows=False)):
            print(harmless(line))
    sys.stdout.flush()
    whole = drive.record(result, with_rows=True) if save or plot else {}
    try:
        if save is not None:
            save.write_text(json.dumps(render.versioned(whole, "Bench"), ensure_ascii=False) + "\n", "utf-8")
        if plot is not None:
            from quire.bench.plot import draw

            draw(whole, plot)
    except OSError as error:
        raise CommandFailed(
            f"cannot write {error.filename or save or plot}: {error.strerror}", None, ExitCode.UNEXPECTED
        ) from error
    if result.interrupted:
        raise Interrupted("the requests that were on the way are aborted; above is what was measured until then")
    rows = [row for run in result.runs for row in run.measured.rows]
    wrong = [row for row in rows if row.error is not None]
    if not rows or len(wrong) == len(rows) or (fail_on_errors and wrong):
        raise CommandFailed(
            f"{len(wrong):,} of {len(rows):,} requests failed", "what is above says with what", ExitCode.FAILED
        )
    return ExitCode.OK


async def _measure(server: Server, model: str | None, settings: Settings) -> Result:
    from dataclasses import replace

    from quire.bench.drive import Driver

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)  # once more is KeyboardInterrupt

    progress = Progress()
    driver = Driver(server, replace(settings, model=await choose(server, model)), stop, progress.show)
    try:
        await driver.prepare()
        loop.add_signal_handler(signal.SIGINT, interrupt)
        return await driver.drive()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        progress.end()
        server.close()


class Progress:
    """How far each run is, on stderr: on a terminal one line that is redrawn, elsewhere a line for each run."""

    SECONDS = 0.1

    def __init__(self) -> None:
        self._redraws = sys.stderr.isatty()
        self._run = ""
        self._drawn = 0.0

    def show(self, run: str, ended: int) -> None:
        import time

        now = time.monotonic()
        if run != self._run:
            self.end()
            self._run = run
            if not self._redraws:
                notice(run)
        elif now - self._drawn < self.SECONDS:
            return
        if self._redraws:
            print(f"\r{run}: {ended:,} ended", end="", file=sys.stderr, flush=True)
            self._drawn = now

    def end(self) -> None:
        """The next line begins anew."""
        if self._redraws and self._run:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._run = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says of the load, by the names of its options; what is left out is None."""

    concurrency: str | None
    rate: str | None
    requests: int | None
    duration: float | None
    input_tokens: str | None
    output_tokens: str | None
    prefix_tokens: int
    trace: Path | None
    speed: float | None
    dataset: Path | None
    endpoint: Any
    stream: bool
    ignore_eos: bool | None
    extra_body: str | None
    goodput: str | None
    warmup: int
    seed: int

    @property
    def ignores_eos(self) -> bool:
        """Whether answers go on to a length that is wanted."""
        if self.ignore_eos is not None:
            return self.ignore_eos
        return self.dataset is None or self.output_tokens is not None


def _settings(load: Options, timeout: float) -> Settings:
    """The command line as settings, whose model is still to be chosen. Raises `BenchError` and `CommandFailed`."""
    from quire.bench import figures, lengths, work
    from quire.bench.drive import Settings

    excluded = (("--input-tokens", load.input_tokens), ("--prefix-tokens", load.prefix_tokens))
    for name, file in (("--trace", load.trace), ("--dataset", load.dataset)):
        clash = next((option for option, value in excluded if file is not None and value), None)
        if clash is not None and not (clash == "--prefix-tokens" and name == "--trace"):
            usage_error(
                f"{clash} has no meaning with {name}", "the file has the prompts, or says how long they are"
            )
    if load.trace is not None and (load.dataset is not None or load.output_tokens is not None):
        usage_error("--trace goes with neither --dataset nor --output-tokens", "a trace has lengths of its own")
    if load.speed is not None and (load.trace is None or load.concurrency is not None or load.rate is not None):
        usage_error("--speed is for the arrivals of a trace", "leave out --concurrency and --rate")
    if load.speed is not None and not (load.speed > 0 and math.isfinite(load.speed)):
        usage_error(f"--speed {load.speed} is no factor", "2 is twice as fast, 0.5 half as fast")
    bounds = figures.parse_bounds(load.goodput) if load.goodput is not None else {}
    if not load.stream and set(bounds) - {"e2e"}:
        usage_error("--goodput on tokens needs a stream", "leave out --no-stream, or bound e2e alone")
    demands = _demands(load.concurrency, load.rate, has_trace=load.trace is not None)
    if load.duration is not None and any(math.isinf(demand.value) for demand in demands) and load.requests is None:
        usage_error("--rate inf sends without end", "give --requests instead of --duration")
    if load.duration is not None and load.duration <= 0:
        usage_error("--duration is nothing", "write it like 30s")
    has_file = load.trace is not None or load.dataset is not None
    outputs = load.output_tokens if has_file or load.output_tokens is not None else DEFAULT_TOKENS[1]
    lines = None if load.trace is None else work.read_trace(load.trace, load.speed or 1.0)
    conversations = None if load.dataset is None else work.read_dataset(load.dataset, load.endpoint)
    return Settings(
        model="",
        demands=demands,
        requests=load.requests,
        seconds=load.duration,
        inputs=None if has_file else lengths.parse(load.input_tokens or DEFAULT_TOKENS[0]),
        outputs=None if outputs is None else lengths.parse(outputs),
        trace=None if lines is None else tuple(lines),
        dataset=None if conversations is None else tuple(conversations),
        prefix=load.prefix_tokens,
        endpoint=load.endpoint,
        streams=load.stream,
        ignores_eos=load.ignores_eos,
        bounds=bounds,
        warmup=load.warmup,
        seed=load.seed,
        more=_extra(load.extra_body),
        file=str(load.trace or load.dataset) if has_file else None,
        speed=load.speed or 1.0,
        timeout=timeout,
    )


def _demands(concurrency: str | None, rate: str | None, has_trace: bool) -> tuple[Demand, ...]:
    from quire.bench.drive import Demand

    if concurrency is not None and rate is not None:
        usage_error("--concurrency and --rate exclude each other", "one is a closed loop, the other an open one")
    if rate is not None:
        rates = _numbers(rate, "--rate", "2,4,8 or inf")
        return tuple(Demand("rate", value) for value in rates)
    if concurrency is None and has_trace:
        return (Demand("trace"),)
    many = _numbers(concurrency or DEFAULT_CONCURRENCY, "--concurrency", "1,8,32")
    if any(value != int(min(value, MOST_AT_A_TIME)) for value in many):
        usage_error(f"--concurrency {concurrency} is no list of whole numbers up to {MOST_AT_A_TIME:,}", "1,8,32")
    return tuple(Demand("concurrency", value) for value in many)


def _numbers(text: str, option: str, example: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not value > 0 for value in values):
        usage_error(f"{option} {text} is no list of numbers above 0", f"write it like {example}")
    if len(set(values)) < len(values):
        usage_error(f"{option} {text} has a number twice", "each number is one run")
    return values


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        usage_error("--extra-body is no JSON object", "write it like '{\"temperature\": 0}'")
    clash = set(fields) & {"model", "messages", "prompt", "stream", "stream_options", "max_tokens", "ignore_eos"}
    if clash:
        usage_error(f"--extra-body cannot have {', '.join(sorted(clash))}", "options of this command say that")
    return fields


def _check_alone(*these: str) -> None:
    """No option is given but these: the others would have no meaning."""
    context = click.get_current_context()
    for param in context.command.params:
        given = context.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and param.name not in these:
            usage_error(f"{param.opts[0]} has no meaning with --{these[0]}", "nothing is sent then")


def _check_writable(path: Path | None) -> None:
    """Find out before anything is measured whether its result can be kept. Raises `BadFile`."""
    from quire.bench import BadFile

    if path is None:
        return
    was_there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise BadFile(f"cannot write {path}: {error.strerror}") from error


def _check_plotting() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise CommandFailed(
            "--plot needs matplotlib, which is not installed", "pip install 'quire[bench]'", ExitCode.USAGE
        ) from error


def _compare(first: Path, second: Path, output: str) -> int:
    from quire.bench import report

    compared = report.compare(_saved(first), _saved(second))
    if output == "json":
        render.dump(compared, "json", "BenchComparison")
    else:
        for line in report.comparison_lines(compared):
            print(line)
    if not compared["runs"]:
        raise CommandFailed(
            "the results have no load in common",
            "compare runs of the same --concurrency or --rate",
            ExitCode.INVALID,
        )
    return ExitCode.OK


def _saved(path: Path) -> Mapping[str, Any]:
    """A result that `--save` wrote. Raises `BadFile`."""
    from pydantic import TypeAdapter, ValidationError

    from quire.bench import BadFile
    from quire.cli.shapes import Bench

    try:
        found: Mapping[str, Any] = TypeAdapter(Bench).validate_json(path.read_bytes())
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BadFile(
            f"{path} is not a saved result: {place + ': ' if place else ''}{first['msg']}",
            "platform bench --save FILE writes one",
        ) from error
    return found
