"""Every group of the official suite: its schema is refused by name, or held to.

Held to means that no spelling of an instance that the suite calls invalid is accepted, that what is written by
random choice among the allowed tokens is valid, and that an instance that the suite calls valid is accepted or is
one that `docs/structured-output.md` says is not. By night all of it, and the table in the docs is compared; in CI
a tenth, where the suite is in the cache.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests import json_schema_suite as suite
from tests.effort import EFFORT, times

from quire import builtin
from quire_engine.errors import RequestRefused
from quire_engine.grammar import Grammar, Grammars
from quire_engine.vocabulary import Vocabulary
from quire_schemas.wire import Structured

SIZE, EOS = 2048, (2041, 2039)
DOCS = Path(__file__).parents[3] / "docs/structured-output.md"
CLAIMED_FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
REFUSALS = re.compile(
    "not supported in a (schema|pattern): |Unknown format: |Unsatisfiable schema: |it is no JSON object"
    "|patternProperty regexes .* are not disjoint|Value for 'multipleOf' has too many digits|regex parse error"
    "|no text satisfies it|.*lookarounds not supported|min/maxProperties only supported"
    "|Failed to generate regex for integer range"
)


# ── how a valid instance may be spelled ───────────────────────────────────────────────────────────────────


def spellings(value: Any) -> list[str]:
    """Texts of JSON that say `value`, without blanks: orders of properties, escapes, forms of numbers."""
    match value:
        case dict():
            texts: list[str] = []
            parts = {key: spellings(part)[:6] for key, part in value.items()}
            for order in itertools.islice(itertools.permutations(value), 24):
                for chosen in itertools.islice(itertools.product(*(parts[key] for key in order)), 8):
                    pairs = (f"{quoted(key)[0]}:{part}" for key, part in zip(order, chosen, strict=True))
                    texts.append("{" + ",".join(pairs) + "}")
            escaped = (f"{quoted(key)[-1]}:{part[0]}" for key, part in parts.items())
            return [*texts, "{" + ",".join(escaped) + "}"]
        case list():
            each = (spellings(part)[:4] for part in value)
            return ["[" + ",".join(chosen) + "]" for chosen in itertools.islice(itertools.product(*each), 32)]
        case bool() | None:
            return [json.dumps(value)]
        case int():
            return [str(value), f"{value}.0", f"{value}e0"]
        case float():
            plain = format(Decimal(repr(value)), "f")
            return [json.dumps(value), plain, *([plain.removesuffix(".0")] if value.is_integer() else [])]
        case _:
            return quoted(value)


def quoted(text: str) -> list[str]:
    """As it is, with every sign above ASCII escaped, and with every sign escaped."""
    units = text.encode("utf-16-be", "surrogatepass")
    escaped = "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
    return [json.dumps(text, ensure_ascii=False), json.dumps(text), f'"{escaped}"']


# ── what a validator says ─────────────────────────────────────────────────────────────────────────────────


def _is_multiple(_: Any, step: Any, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if number and (Fraction(value) / Fraction(step)).denominator != 1:
        yield jsonschema.ValidationError(f"{value} is not a multiple of {step}")


FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date", raises=ValueError)
def _is_date(text: object) -> bool:
    return not isinstance(text, str) or bool(date.fromisoformat(text.replace("0000-", "2000-", 1)))


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(text: object) -> bool:
    if not isinstance(text, str):
        return True
    return bool(re.search(r"(Z|z|[+-]\d\d:\d\d)$", text)) and bool(
        datetime.fromisoformat(re.sub(r"\.\d+", "", text).upper().replace("0000-", "2000-", 1))
    )


@FORMATS.checks("time", raises=ValueError)
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or _is_date_time(f"2000-01-01T{text}")


# numbers are compared as they are written: a reader that rounds them may see another
Exact = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {"multipleOf": _is_multiple},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "number", lambda _, value: isinstance(value, int | Decimal) and not isinstance(value, bool)
    ).redefine(
        "integer",
        lambda _, value: (
            (isinstance(value, int) and not isinstance(value, bool))
            or (isinstance(value, Decimal) and value == value.to_integral_value())
        ),
    ),
)


# ── a grammar's texts ─────────────────────────────────────────────────────────────────────────────────────


class Tokens:
    """The built-in model's vocabulary."""

    def __init__(self) -> None:
        self.texts = Vocabulary.read(builtin.path(), SIZE, EOS).tokens
        self.of_byte = {text[0]: index for index, text in enumerate(self.texts) if len(text) == 1}
        self.closing = {
            index for index, text in enumerate(self.texts) if text[:1] in (b'"', b"}", b"]", b",", b":")
        }

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether the whole of `text` fits, written byte by byte."""
        matcher = grammar.matcher(EOS)
        output: list[int] = []
        for byte in text.encode("utf-8", "surrogatepass"):
            token = self.of_byte.get(byte)
            if token is None or not matcher.allowed(output)[token // 8] >> token % 8 & 1:
                return False
            output.append(token)
        return bool(matcher.allowed(output)[EOS[0] // 8] >> EOS[0] % 8 & 1)

    def written(self, grammar: Grammar, rng: random.Random, liked: set[int]) -> str | None:
        """A text by random choice, those of `liked` rather than others; None if it comes to no end."""
        matcher = grammar.matcher(EOS)
        output: list[int] = []
        while len(output) < 250:
            bits = int.from_bytes(matcher.allowed(output), "little")
            allowed: list[int] = []
            while bits:
                allowed.append((bits & -bits).bit_length() - 1)
                bits &= bits - 1
            going = [index for index in allowed if index not in EOS]
            if len(going) < len(allowed) and (not going or len(output) > 60 or rng.random() < 0.3):
                return b"".join(self.texts[index] for index in output).decode()
            chance = rng.random()
            pool: Sequence[int] = going
            if len(output) > 60 or chance < 0.25:
                pool = [index for index in going if index in self.closing]
            elif chance < 0.75:
                pool = [index for index in going if index in liked]
            output.append(rng.choice(pool or going))
        return None


# ── the suite ─────────────────────────────────────────────────────────────────────────────────────────────


def why_not_accepted(group: suite.Group, data: Any) -> str:
    """What the docs say of a valid instance that is not accepted; empty if they say nothing."""
    if group.file == "format":
        return "a format is held to, where the suite has it as a note"
    if group.file in ("optional/format/time", "optional/format/date-time") and ":60" in data:
        return "no leap seconds"
    if group.file == "optional/format/email" and ('"' in data or "[" in data):
        return "no quoted names and no addresses of hosts in an email"
    if group.file == "optional/format/ipv6" and "." in data:
        return "no dotted end in an ipv6"
    if group.file == "optional/ecmascript-regex" and data in ("\x0b", "\x01"):
        return "of control characters, those that JSON abbreviates"
    if group.file == "optional/ecmascript-regex" and data in ("\ufeff", "é", "߀"):
        return "in patterns, of a class of signs those on which engines agree"
    if group.file == "optional/bignum" and abs(data) > 2**53:
        return "bounds beyond double precision move inwards"
    return ""


def is_claimed(file: str) -> bool:
    kind, _, name = file.rpartition("/")
    return kind == "" or (kind == "optional/format" and name in CLAIMED_FORMATS) or kind == "optional"


@pytest.fixture(scope="module")
def all_groups() -> list[suite.Group]:
    if EFFORT == 1 and not suite.is_here():
        pytest.skip("the suite is not in the cache; `make nightly` fetches it")
    suite.fetch()
    return [group for group in suite.groups() if is_claimed(group.file)]


def test_the_official_suite_is_refused_by_name_or_held_to(all_groups: list[suite.Group]) -> None:
    assert len(all_groups) > 420
    grammars, tokens = Grammars(builtin.path(), SIZE, EOS), Tokens()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[str] = []
    for number, group in enumerate(all_groups):
        if number % times(10, 1):
            continue
        count = counts[group.file]
        count["groups"] += 1
        place = f"{group.file}: {group.description}"
        text = json.dumps(group.schema)
        try:
            grammar = grammars.compile(Structured("json_schema", text, ""))
        except RequestRefused as refusal:
            if refusal.code != "invalid_grammar" or not REFUSALS.match(str(refusal)):
                wrong.append(f"{place}: {refusal.code}: {refusal}")
            continue
        count["compiled"] += 1
        spaced = grammars.compile(Structured("json_schema", text))
        for case in group.cases:
            fits = [each for each in spellings(case.data) if tokens.takes(grammar, each)]
            fits += [
                each
                for each in (json.dumps(case.data), json.dumps(case.data, ensure_ascii=False, indent=2))
                if tokens.takes(spaced, each)
            ]
            if not case.valid:
                wrong += [f"{place}: {case.description}: {each!r} is accepted, {text}" for each in fits]
                count["invalid"] += 1
            elif fits:
                count["accepted"] += 1
            else:
                count["not accepted"] += 1
                if not (why := why_not_accepted(group, case.data)):
                    wrong.append(f"{place}: {case.description}: {case.data!r} is not accepted")
                counts[""][why] += 1
        wrong += check_what_is_written(group, [grammar, spaced], tokens, counts[""])
    assert not wrong, "\n".join(wrong)
    assert counts[""]["written"] > times(60, 3000)
    print(dict(counts[""]))
    if EFFORT > 1:
        table = "\n".join(as_table(counts))
        assert table in DOCS.read_text(), f"docs/structured-output.md should have\n{table}"


def check_what_is_written(
    group: suite.Group, grammars: list[Grammar], tokens: Tokens, count: Counter[str]
) -> Iterator[str]:
    """What is wrong with texts by random choice."""
    validator = Exact(group.exact, format_checker=FORMATS)
    rng = random.Random(f"{group.description} {EFFORT}")
    signs = set(json.dumps(group.schema, ensure_ascii=False).encode())
    liked = {index for index, text in enumerate(tokens.texts) if text and signs.issuperset(text)}
    for number in range(times(4, 24)):
        written = tokens.written(grammars[number % 2], rng, liked)
        if written is None:
            count["cut"] += 1
            continue
        count["written"] += 1
        try:
            validator.validate(json.loads(written, parse_float=Decimal))
        except InvalidOperation:
            count["with an exponent above that of decimals"] += 1
        except re.error:
            count["with a pattern that Python does not read"] += 1
        except jsonschema.ValidationError as error:
            yield f"{group.file}: {group.description}: {written!r} was written: {error.message}"


def as_table(counts: dict[str, Counter[str]]) -> Iterator[str]:
    """The figures as the docs have them, and below them the files of which nothing compiles."""
    yield "| file of the suite | schemas | held to | valid, accepted | valid, not accepted | invalid, refused |"
    yield "|---|--:|--:|--:|--:|--:|"
    total: Counter[str] = Counter()
    refused: list[str] = []
    shown = ("groups", "compiled", "accepted", "not accepted", "invalid")
    for file, count in counts.items():
        if not file:
            continue
        total += count
        if not count["compiled"]:
            refused.append(f"`{file}` ({count['groups']})")
            continue
        yield f"| `{file}` | " + " | ".join(str(count[name]) for name in shown) + " |"
    yield "| all | " + " | ".join(str(total[name]) for name in shown) + " |"
    yield ""
    yield "Refused whole: " + ", ".join(refused) + "."
