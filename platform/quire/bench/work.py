"""What is sent: requests as bytes, drawn from one seed or read from a file.

Lengths are the same in every run of a command; the words of prompts are not, since a server's prefix cache would
know them from the run before. A request is made when it is needed, before its time is taken.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from quire.bench.errors import BadFile
from quire.bench.lengths import Lengths
from quire.bench.prompts import FIRST, Vocabulary
from quire.remote.server import encode

Endpoint = Literal["chat", "completions"]
PATHS: Mapping[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}
ARRIVAL = ("arrival", "arrived_at", "timestamp", "TIMESTAMP")
INPUT = ("input_tokens", "num_prefill_tokens", "ContextTokens")
OUTPUT = ("output_tokens", "num_decode_tokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens of one request: of its prompt in all, and of its answer at most. None: as the server has it."""

    input_tokens: int | None
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to be sent."""

    index: int
    body: bytes
    size: Size


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One request of a trace. `arrival` is in seconds from the first one's."""

    arrival: float
    size: Size


@dataclass(frozen=True, slots=True)
class DatasetLine:
    """A conversation, or the prompt of a completion, and how long the answer may be."""

    content: list[Any] | str
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class Form:
    """What all requests have in common. `more` are fields that go into each body as they are."""

    model: str
    endpoint: Endpoint
    streams: bool
    counts_tokens: bool
    """Whether the server is asked for the usage so far in every event."""
    ignores_eos: bool
    more: Mapping[str, Any] = field(default_factory=dict)

    def body(self, content: list[Any] | str, output_tokens: int | None) -> bytes:
        """The request for an answer to `content`: messages, or a text."""
        asked: dict[str, Any] = {"model": self.model}
        if self.endpoint == "completions":
            asked["prompt"] = content
        else:
            asked["messages"] = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if output_tokens is not None:
            asked["max_tokens"] = output_tokens
        if self.ignores_eos:
            asked["ignore_eos"] = True
        if self.streams:
            asked["stream"] = True
            asked["stream_options"] = {"include_usage": True}
            if self.counts_tokens:
                asked["stream_options"]["continuous_usage_stats"] = True
        return encode({**asked, **self.more})


def drawn_sizes(inputs: Lengths, outputs: Lengths, prefix: int, seed: int) -> Iterator[Size]:
    """Sizes without end. The shared prefix counts beside the length that is drawn for the input."""
    rng = random.Random(f"{seed}:lengths")
    while True:
        yield Size(prefix + inputs.draw(rng), outputs.draw(rng))


def made(
    sizes: Iterator[Size], vocabulary: Vocabulary, form: Form, prefix: int, seed: int, run: str
) -> Iterator[Request]:
    """Requests of these sizes, of random words. The first `prefix` tokens are the same in all of a seed."""
    shared = vocabulary.text(prefix, random.Random(f"{seed}:prefix")) if prefix else FIRST
    rng = random.Random(f"{seed}:{run}:words")
    for index, size in enumerate(sizes):
        text = vocabulary.prompt(size.input_tokens or 0, rng, shared, prefix)
        yield Request(index, form.body(text, size.output_tokens), size)


def taken(lines: list[DatasetLine], form: Form, outputs: Lengths | None, seed: int) -> Iterator[Request]:
    """Requests of a data set in its order, from its beginning again where it ends."""
    rng = random.Random(f"{seed}:lengths")
    for index, line in enumerate(itertools.cycle(lines)):
        output_tokens = outputs.draw(rng) if outputs is not None else line.output_tokens
        yield Request(index, form.body(line.content, output_tokens), Size(None, output_tokens))


def read_trace(path: Path, speed: float = 1.0) -> list[TraceLine]:
    """A trace: CSV with a header, or JSON objects a line. Raises `BadFile`, with the line.

    Arrivals are counted from the first one and divided by `speed`.
    """
    rows = list(_csv(path) if path.suffix.lower() == ".csv" else _jsonl(path))
    if not rows:
        raise BadFile(f"{path}: there is no request in it")
    lines: list[Any] = []
    for number, row in rows:
        place = f"{path}:{number}"
        arrival = _instant(_field(row, ARRIVAL, place), place)
        sizes = [_tokens(_field(row, names, place), place) for names in (INPUT, OUTPUT)]
        if lines and arrival < lines[-1][0]:
            raise BadFile(f"{place}: it arrives before the line above", "sort the trace by arrival")
        lines.append((arrival, Size(sizes[0], max(sizes[1], 1))))
    return [TraceLine((arrival - lines[0][0]) / speed, size) for arrival, size in lines]


def read_dataset(path: Path, endpoint: Endpoint) -> list[DatasetLine]:
    """A data set: a JSON object a line, with `messages`, or `prompt` for completions. Raises `BadFile`."""
    name = "messages" if endpoint == "chat" else "prompt"
    lines: list[Any] = []
    for number, row in _jsonl(path):
        place = f"{path}:{number}"
        content = row.get(name)
        if not content or not isinstance(content, list if endpoint == "chat" else str):
            raise BadFile(f"{place}: it has no {name}", f'a line is {{"{name}": …}}, and may have "output_tokens"')
        if isinstance(content, list):
            content = _to_be_answered(content)
        asked = next((row[key] for key in ("output_tokens", "max_tokens") if row.get(key) is not None), None)
        lines.append(DatasetLine(content, None if asked is None else _tokens(asked, place)))
    if not lines:
        raise BadFile(f"{path}: there is no line in it")
    return lines


def _to_be_answered(messages: list[Any]) -> list[Any]:
    """The conversation up to its last question: recorded ones end with the answer."""
    end = len(messages)
    while end > 1 and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
        end -= 1
    return messages[:end]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8") from error


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_text(path).splitlines())
    for row in reader:
        yield reader.line_num, row


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{path}:{number}: not JSON: {error}", "the file has one JSON object a line") from error
        if not isinstance(row, dict):
            raise BadFile(f"{path}:{number}: not a JSON object", "the file has one JSON object a line")
        yield number, row


def _field(row: Mapping[str, Any], names: tuple[str, ...], place: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadFile(f"{place}: it has no {names[0]}", f"the field may be called {', '.join(names)}")


def _instant(value: Any, place: str) -> float:
    """Seconds: a number of them, or a date with its time."""
    try:
        if math.isfinite(seconds := float(value)):
            return seconds
    except (TypeError, ValueError):
        pass
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        raise BadFile(f"{place}: {value!r} is no time", "give seconds, or a date with its time") from None


def _tokens(value: Any, place: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise BadFile(f"{place}: {value!r} is no number of tokens")
    return number
