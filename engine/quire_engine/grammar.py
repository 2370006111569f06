"""Structured output: from a constraint in a request to the tokens that may come next.

Three steps. `source` writes the constraint as a grammar in llguidance's notation. `Grammars` compiles it, in
threads of its own and off the engine's: it tries it first in a child process (`trial`), where a grammar that
crashes, hangs or swells harms nobody, and keeps what was compiled, and what was refused. `Matcher` is the state of
one request: it takes the tokens drawn so far and gives one bit for each token that may be next.

What is usual compiles in some milliseconds. What takes longer gives way to a second queue and is tried again
there, and either queue is served from both its ends by turns: whoever comes while many hostile grammars wait is
soon next.

The bits allow every token whose bytes some text of the grammar continues with, however it cuts the text: which
spelling is likely is left to the model. Where the text may end, and nowhere else, the ids that end it are allowed.
The constraint holds from the first token on. A model that thinks before it answers has room for that if the
constraint is a form that begins with the thought: then it is the form's rest that the answer is held to.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance
import msgspec

from quire_engine.errors import GrammarFailed, NoVocabulary, RequestRefused
from quire_engine.json_schema import ESCAPES, REFUSED, Root, prepared
from quire_engine.trial import (
    CPU_SECONDS,
    LIMITS,
    QUICK_SECONDS,
    TakesTooLong,
    Trial,
    TrialFailed,
    explain,
    stand_back,
)
from quire_engine.vocabulary import Vocabulary
from quire_schemas.wire import MAX_STRUCTURED, Structured

WHITESPACE = r" |\r?\n[ \t]{0,24}"
"""Between two signs of JSON, unless the request says otherwise: a blank, or a line end and what indents the next.
Any amount of it is what a small model writes until it is cut.
"""
MAX_COMPILING, MAX_SLOW = 256, 64
"""Constraints that may wait to be compiled, and to be tried again."""
KEPT_GRAMMARS = 256
KEPT_BYTES = 64 << 20
"""Bounds on what is kept: constraints, and bytes of memory that they take."""
GROWTH = 256 << 20
"""Bytes that a grammar may take for each second of making masks: what requests find out about it stays with it,
for all of them. This is for grammars made to be large; usual ones take a hundredth.
"""
MOST_GROWN = 32 << 20
"""A grammar that may have grown by as much is compiled anew for the next request."""
MAX_BYTES = 16 << 20
"""Of one compiled constraint."""
MAX_WRITTEN = 1 << 20
"""Characters of a form's schemas once each stands alone: many may refer to the same large ones."""
SAVINGS = 0.1
EARNED = 0.001
"""Seconds of processor time that a request may spend on its grammar at once, and what each token adds until it has
as many again. An ambiguous grammar costs more with each token; 0.1 ms is usual.
"""

_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_QUICK_TRIAL, _SLOW_TRIAL = Trial(), Trial()


# ── from a request's words to the compiler's ──────────────────────────────────────────────────────────────


_not_honoured = re.compile(r"^\s*(?:\w+\s*\[[^\]\n]*\b(temperature)\s*=|(%llguidance)\b)", re.MULTILINE)
"""What the compiler reads in a grammar and nothing heeds."""


def source(structured: Structured, special: Mapping[str, int]) -> str:
    """The constraint in llguidance's notation. `special` are the tokens that no text spells, by name.

    Raises `RequestRefused`.
    """
    text = structured.text
    if len(text.encode()) > MAX_STRUCTURED:
        raise RequestRefused(REFUSED, f"it has more than {MAX_STRUCTURED} bytes")
    body = text
    grammars: list[str] = []
    match structured.kind:
        case "grammar":
            _check_honoured(text)
        case "json_schema" | "regex" | "choice" | "structural_tag" | "form":
            writer = _Writer(special, structured.whitespace)
            try:
                start = writer.structured(structured)
            except (KeyError, TypeError, AttributeError, msgspec.MsgspecError, RecursionError):
                if structured.kind not in _SHAPES:
                    raise
                raise RequestRefused(REFUSED, _SHAPES[structured.kind]) from None
            body, grammars = "\n".join([f"start: {start}", *writer.rules]), writer.grammars
    body += _OPTIONS  # behind it, so that lines and columns in errors are the author's
    if not grammars:
        return body
    inner = [{"name": f"g{at}", "lark_grammar": each + _OPTIONS} for at, each in enumerate(grammars)]
    return json.dumps({"grammars": [{"lark_grammar": body}, *inner]})


_SHAPES = {
    "structural_tag": "it must have 'triggers' and 'structures', each with 'begin', 'schema' and 'end'",
    "form": "it is no form",
}


def _check_honoured(text: str) -> None:
    if ignored := _not_honoured.search(text):
        raise RequestRefused(REFUSED, f"not supported in a grammar: {ignored[1] or ignored[2]}")


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RequestRefused(REFUSED, f"it is no JSON object: {error}") from None


def _json(schema: object, whitespace: str | None, *, lenient: bool = False) -> str:
    """The rule for JSON that fits `schema`, or what of it can be held to."""
    if not isinstance(schema, dict):
        raise RequestRefused(REFUSED, "a schema must be a JSON object")
    if "x-guidance" in schema:
        raise RequestRefused(REFUSED, "'x-guidance' is not honoured in a schema")
    options: dict[str, Any] = {"json_allowed_escapes": ESCAPES}
    if whitespace == "":
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = WHITESPACE if whitespace is None else whitespace
    if lenient:
        options["lenient"] = True
    return "%json " + json.dumps(prepared(schema) | {"x-guidance": options})


def _quoted(text: str) -> str:
    """A text as a literal of the notation: a JSON string, or a regular expression where that takes none."""
    if not text:
        return "/()/"
    if text.isprintable():
        return json.dumps(text, ensure_ascii=False)
    return "/" + "".join(f"\\u{{{ord(char):x}}}" for char in text) + "/"


_Begin = tuple[str, str, bool]
"""A mark at the beginning of free text, what follows it, and whether free text does then."""

_ANY_TEXT = r"/(.|\n)*/"


def _characters(least: int, most: int | None) -> str:
    """Any text of so many characters."""
    if not least and most is None:
        return _ANY_TEXT
    return rf"/(.|\n){{{int(least)},{'' if most is None else int(most)}}}/"


class _Writer:
    """Writes constraints as the right side of a rule, and the rules that it takes."""

    def __init__(self, special: Mapping[str, int], whitespace: str | None) -> None:
        self.rules: list[str] = []
        self.grammars: list[str] = []
        """Whole grammars of others, whose names would get into the way of ours."""
        self._special = special
        self._whitespace = whitespace
        self._root: Root | None = None
        """What references in schemas are into, where it is not each by itself."""
        self._schemas: dict[tuple[Root | None, str, bool, str | None], str] = {}
        self._size = 0
        """Characters of all schemas as they are written."""

    def structured(self, structured: Structured) -> str:
        text = structured.text
        match structured.kind:
            case "json_schema":
                return _json(_object(text), structured.whitespace)
            case "regex":
                return f"/{llguidance.regex_to_lark(text or '()', use_ascii='')}/"
            case "choice":
                return " | ".join(map(_quoted, msgspec.json.decode(text, type=list[str])))
            case "grammar":
                _check_honoured(text)
                self.grammars.append(text)
                return f"@g{len(self.grammars) - 1}"
            case "structural_tag":
                return self._tags(_object(text))
            case "form":
                return self.form(_object(text))

    def form(self, form: Mapping[str, Any]) -> str:
        match form:
            case {"text": text}:
                return _with_special(text, self._special) or _quoted("")
            case {"through": mark}:
                return self._through(mark, text=_characters(form.get("least") or 0, form.get("most")))
            case {"schema": schema}:
                return self._schema(schema, form.get("lenient", False))
            case {"root": dict(root), "form": inner}:
                outer, self._root = self._root, Root(root)
                written = self.form(inner)
                self._root = outer
                return written
            case {"regex": text}:
                return self.structured(Structured("regex", text))
            case {"sequence": forms}:
                return " ".join(f"({self.form(each)})" for each in forms)
            case {"any": forms}:
                return self._rule(" | ".join(self.form(each) for each in forms))
            case {"repeat": repeated}:
                return self._repeat(self._rule(self.form(repeated)), form)
            case {"some": forms, "between": between}:
                return self._some([self.form(each) for each in forms], self.form(between))
            case {"structured": described}:
                return self._nested(msgspec.convert(described, Structured), self._begins(form))
            case {"free": starts}:
                found = [(start["mark"], self.form(start["then"])) for start in starts]
                return self._free(found, self._begins(form))
        raise KeyError

    def _nested(self, structured: Structured, begins: list[_Begin]) -> str:
        outer, self._whitespace = self._whitespace, structured.whitespace
        if structured.kind == "structural_tag":
            written = self._tags(_object(structured.text), begins)
        else:
            written = self.structured(structured)
        self._whitespace = outer
        return written

    def _begins(self, form: Mapping[str, Any]) -> list[_Begin]:
        given = form.get("begins") or ()
        return [(begin["mark"], self.form(begin["then"]), bool(begin.get("again"))) for begin in given]

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def _schema(self, schema: Any, lenient: bool) -> str:
        """A rule for a schema; one for all that are alike, for each is written with all that it refers to."""
        key = (self._root, json.dumps(schema), lenient, self._whitespace)
        if key not in self._schemas:
            self._schemas[key] = self._rule(self._held(schema, lenient))
        return self._schemas[key]

    def _held(self, schema: Any, lenient: bool) -> str:
        """JSON that fits a schema."""
        try:
            if self._root is not None and isinstance(schema, dict):
                schema = self._root.standing_alone(schema)
            wrong = self._too_much(schema)
            if wrong is None:
                return _json(schema, self._whitespace, lenient=lenient)
        except RequestRefused:
            if not lenient:
                raise
            kind = schema.get("type") if isinstance(schema, dict) else None
            return _json({"type": kind} if isinstance(kind, str) else {}, self._whitespace)
        raise wrong

    def _too_much(self, schema: object) -> RequestRefused | None:
        """Count what a schema takes, and refuse what is too much of it."""
        self._size += len(json.dumps(schema))
        if self._size <= MAX_WRITTEN:
            return None
        return RequestRefused(
            REFUSED, f"its schemas take more than {MAX_WRITTEN >> 20} MiB, each with all that it refers to"
        )

    def _through(self, mark: str, *, text: str = _ANY_TEXT) -> str:
        """Text up to the mark. No text spells a special token, so there nothing need be said of the first."""
        if mark in self._special:
            return f"{text} <[{self._special[mark]}]>"
        if any(name in mark for name in self._special):
            raise RequestRefused(REFUSED, f"trigger {mark!r} has a special token and more")
        return self._rule(f"{text} {_quoted(mark)}", "[lazy]")

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _repeat(self, item: str, form: Mapping[str, Any]) -> str:
        least, most, between = form.get("least") or 0, form.get("most"), form.get("between")
        more = f"({self.form(between)} {item})" if between is not None else item
        bounds = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = item if most == 1 else f"{item} {more}{bounds}"
        return some if least else f"({some})?"

    def _some(self, items: Sequence[str], between: str) -> str:
        """Some of the items, in their order: some of the first half, of the second, or of both. So what is written
        is as long as the items are, and not deep.
        """
        if not items:
            return _quoted("")
        comma, parts = self._rule(between), [self._rule(item) for item in items]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            halves = [self._rule(f"{first} ({comma} {second})? | {second}") for first, second in pairs]
            parts = [*halves, *parts[2 * len(halves) :]]
        return f"({parts[0]})?"

    def _free(self, starts: Sequence[tuple[str, str]], begins: Sequence[_Begin] = ()) -> str:
        """Free text. `starts` are marks anywhere in it and what follows them; `begins` marks at its beginning,
        what follows, and whether free text does then. Text cannot be read in two ways, or the wrong one might be
        held to: none begins as something else does.
        """
        if not starts:
            raise RequestRefused(REFUSED, "it has no structures")
        named = [(mark, self._rule(then)) for mark, then in starts]
        parts = " | ".join(f"{self._through(mark)} {then}" for mark, then in named)
        rest = self._rule(f"({parts})* {_ANY_TEXT}")
        firsts = [(mark, self._rule(then)) for mark, then, again in begins if not again]
        whole = self._beginning(named, rest, firsts) if firsts else rest
        repeated = [(mark, self._rule(f"{then} {whole}")) for mark, then, again in begins if again]
        return self._beginning(named, rest, [*firsts, *repeated]) if repeated else whole

    def _beginning(self, starts: Sequence[tuple[str, str]], rest: str, firsts: Sequence[tuple[str, str]]) -> str:
        """Free text that begins with one of `firsts`, or like none of them."""
        marks = [_quoted(mark) for mark, _ in firsts if mark not in self._special]
        text = _ANY_TEXT
        if marks:
            text = self._terminal(f"{_ANY_TEXT} & ~(/[ \\t\\r\\n]*/ ({' | '.join(marks)}) {_ANY_TEXT})")
        found = [f"{self._through(mark, text=text)} {then} {rest}" for mark, then in starts]
        for mark, then in firsts:
            head = f"/[ \\t\\r\\n]*/ {_with_special(mark, self._special)}"
            found.append(f"{head if mark in self._special else self._terminal(head)} {then}")
        return self._rule(" | ".join([*found, text]))

    def _tags(self, described: Mapping[str, Any], begins: Sequence[_Begin] = ()) -> str:
        """Free text in which a trigger begins a structure; then its `begin`, JSON by its `schema`, and its `end`.

        Where several triggers fit a structure, it is the shortest that decides.
        """
        triggers = sorted(described["triggers"], key=len)
        starts: list[tuple[str, str]] = []
        for number, structure in enumerate(described["structures"]):
            begin, end = structure["begin"], structure["end"]
            trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
            if trigger is None:
                raise RequestRefused(REFUSED, f"structure {number} begins with none of the triggers")
            body = [
                _with_special(begin[len(trigger) :], self._special),
                _json(structure["schema"], self._whitespace),
                _with_special(end, self._special),
            ]
            starts.append((trigger, " ".join(part for part in body if part)))
        return self._free(starts, begins)


def _with_special(text: str, special: Mapping[str, int]) -> str:
    """A text of which parts may be special tokens."""
    if not special:
        return _quoted(text) if text else ""
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    parts = (part for part in re.split(f"({names})", text) if part)
    return " ".join(f"<[{special[part]}]>" if part in special else _quoted(part) for part in parts)


# ── compiling ─────────────────────────────────────────────────────────────────────────────────────────────


class _Wrapped:
    """A vocabulary as the compiler wants it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted({*vocabulary.special.values(), *vocabulary.eos_token_ids})
        self.eos_token_id = vocabulary.eos_token_ids[0]

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("no text is forced, so none is ever tokenized")


class Grammar:
    """A compiled constraint, for any number of requests."""

    def __init__(self, fresh: llguidance.LLMatcher, eos_token_ids: tuple[int, ...], size: int) -> None:
        self._fresh = fresh
        self.eos = frozenset(eos_token_ids)
        self._size = size
        self.spent = 0.0
        """Seconds that masks have taken."""
        self.full = False
        """Whether it has grown as far as it may: no request can go on with it, a new one not either."""

    def matcher(self, ending_ids: Sequence[int]) -> Matcher:
        """The state of a request that `ending_ids` end, the checkpoint's own among them."""
        return Matcher(self._fresh.deep_copy(), self, ending_ids)

    @property
    def size(self) -> int:
        """Bytes that it takes at most."""
        return self._size + int(GROWTH * self.spent)

    @property
    def is_worn(self) -> bool:
        """Whether it should be compiled anew."""
        return self.full or GROWTH * self.spent > MOST_GROWN


class Matcher:
    """How far one request's text has come in its grammar. Not thread-safe.

    It takes up what is new in a history that only grows, so asking twice for the same place changes nothing, and
    a request that is preempted and computed again needs nothing of it. What it costs is counted: a request whose
    grammar would hold up the step for everybody ends.
    """

    __slots__ = ("_ending", "_grammar", "_has_own_ends", "_savings", "_state", "_taken")

    def __init__(self, state: llguidance.LLMatcher, grammar: Grammar, ending_ids: Sequence[int]) -> None:
        self._state = state
        self._grammar = grammar
        self._ending = tuple(ending_ids)
        self._has_own_ends = not grammar.eos >= set(ending_ids)
        self._taken = 0
        self._savings = SAVINGS

    def allowed(self, output: Sequence[int], *, may_end: bool = True) -> bytes:
        """Bits of the tokens that may follow `output`: bit `i % 8` of byte `i // 8`, and at least one of them set.

        Ending ids are among them where the text may end. Without `may_end` that is only where it must; and they
        are, wherever no other token can go on. Raises `GrammarFailed`.
        """
        if self._savings < 0:
            raise GrammarFailed(f"it costs too much to follow after {self._taken} tokens")
        began, state = time.thread_time(), self._state
        for token in output[self._taken :]:
            if not state.consume_token(token):
                raise GrammarFailed(self._failure())
            self._taken += 1
        bits = state.compute_bitmask()
        if state.is_error():
            raise GrammarFailed(self._failure())
        spent = time.thread_time() - began
        self._savings = min(self._savings + EARNED, SAVINGS) - spent
        self._grammar.spent += spent
        if may_end and not self._has_own_ends:
            return bits
        # bytes of the checkpoint's vocabulary that a request has declared to be ends are ends, and nothing else
        accepting = state.is_accepting()
        shaped = bytearray(bits)
        ending = [index for index in self._ending if index < 8 * len(shaped)]  # others are never drawn
        for index in ending:
            shaped[index // 8] &= ~(1 << index % 8)
        stuck = shaped.count(0) == len(shaped)
        if accepting and (may_end or stuck):
            for index in ending:
                shaped[index // 8] |= 1 << index % 8
        return bits if stuck and not accepting else bytes(shaped)

    def _failure(self) -> str:
        error = self._state.get_error()
        self._grammar.full |= "too many states" in error
        if error.startswith("NoExtensionBias"):
            return "no token of the vocabulary can go on with the text"
        return f"it cannot be followed after {self._taken} tokens: {explain(self._state)}"


class _ByTurns:
    """A thread for jobs that wait: the newest and the oldest of them by turns."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name, initializer=stand_back)
        self._jobs: deque[Callable[[], None]] = deque()
        self._newest = False

    def submit(self, job: Callable[[], None]) -> Future[None]:
        self._jobs.append(job)
        return self._thread.submit(self._next)

    def __len__(self) -> int:
        return len(self._jobs)

    def _next(self) -> None:
        self._newest = not self._newest
        job = self._jobs.pop() if self._newest else self._jobs.popleft()
        job()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A constraint's grammar, its refusal, or neither yet."""

    made: Future[Grammar]
    text: int

    @property
    def grammar(self) -> Grammar | None:
        return self.made.result() if self.made.done() and self.made.exception() is None else None

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 * self.text + (self.grammar.size if self.grammar is not None else 0)


class Grammars:
    """Compiles constraints for one checkpoint, and keeps the latest."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._folder = folder
        self._size = vocab_size
        self._eos = eos_token_ids
        self._quick, self._slow = _ByTurns("grammar"), _ByTurns("grammar-slow")
        self._kept: OrderedDict[Structured, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Read the vocabulary now, so that the first request with a constraint does not wait for it."""

        def read() -> None:
            _ = self._tokenizer

        self._quick.submit(read).exception()  # what is wrong is said to who needs it

    @property
    def kept_bytes(self) -> int:
        """Bytes that all that is kept takes."""
        with self._lock:
            return sum(each.size for each in self._kept.values())

    def submit(self, structured: Structured) -> Future[Grammar]:
        """The grammar, done if it is kept. It raises `RequestRefused` if the constraint cannot be honoured."""
        with self._lock:
            found = self._kept.get(structured)
            if found is not None and not (found.grammar is not None and found.grammar.is_worn):
                self._kept.move_to_end(structured)
                return found.made
            made: Future[Grammar] = Future()
            if len(self._quick) >= MAX_COMPILING:
                self._kept.pop(structured, None)
                made.set_exception(_too_many(len(self._quick)))
                return made
            self._kept[structured] = _Kept(made, len(structured.text))
            self._kept.move_to_end(structured)
        self._quick.submit(lambda: self._attempt(structured, made, _QUICK_TRIAL, QUICK_SECONDS))
        return made

    def compile(self, structured: Structured) -> Grammar:
        """As `submit`, and wait for it."""
        return self.submit(structured).result()

    def _attempt(self, structured: Structured, made: Future[Grammar], trial: Trial, seconds: float) -> None:
        """Compile a constraint, refuse it, or have it tried again where it is in nobody's way."""
        try:
            grammar = self._compile(structured, trial, seconds)
        except TakesTooLong:
            if trial is _SLOW_TRIAL:
                made.set_exception(RequestRefused(REFUSED, f"it takes longer than {seconds:g} s to compile"))
            elif len(self._slow) < MAX_SLOW:
                self._slow.submit(lambda: self._attempt(structured, made, _SLOW_TRIAL, CPU_SECONDS))
                return
            else:
                self._forget(structured)
                made.set_exception(_too_many(len(self._slow)))
        except (TrialFailed, OSError) as error:
            self._forget(structured)  # the machine's fault, not the grammar's: another time it may be tried
            why = error.strerror if isinstance(error, OSError) else error  # without a path: clients read it
            made.set_exception(RequestRefused("queue_full", f"constraints cannot be tried now: {why}"))
        except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
            made.set_exception(error)
        else:
            made.set_result(grammar)
        self._let_go()

    def _forget(self, structured: Structured) -> None:
        with self._lock:
            self._kept.pop(structured, None)

    def _let_go(self) -> None:
        """Forget the longest unused until what is kept is within bounds."""
        with self._lock:
            total = sum(each.size for each in self._kept.values())
            for structured in [structured for structured, kept in self._kept.items() if kept.made.done()]:
                if len(self._kept) <= KEPT_GRAMMARS and total <= KEPT_BYTES:
                    break
                total -= self._kept.pop(structured).size

    def _compile(self, structured: Structured, trial: Trial, seconds: float) -> Grammar:
        try:
            vocabulary, tokenizer = self._tokenizer
        except NoVocabulary as error:
            raise RequestRefused(REFUSED, f"this model cannot be held to one: {error}") from error
        written = source(structured, vocabulary.special)
        verdict = trial.check(written, self._size, vocabulary.special, vocabulary.eos_token_ids, seconds)
        wrong = verdict.wrong
        if not wrong and verdict.size > MAX_BYTES:
            wrong = f"it takes more than {MAX_BYTES >> 20} MiB when compiled"
        if not wrong:
            matcher = llguidance.LLMatcher(tokenizer, written, log_level=0, limits=LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # what is found out for the first mask, the copies know
            wrong = explain(matcher)
        if wrong:
            raise RequestRefused(REFUSED, _to_the_author(structured, wrong))
        return Grammar(matcher, vocabulary.eos_token_ids, verdict.size)

    @cached_property
    def _tokenizer(self) -> tuple[Vocabulary, llguidance.LLTokenizer]:
        vocabulary = Vocabulary.read(self._folder, self._size, self._eos)
        wrapped: Any = _Wrapped(vocabulary)
        return vocabulary, llguidance.LLTokenizer(wrapped, eos_token=list(vocabulary.eos_token_ids))


def _too_many(waiting: int) -> RequestRefused:
    return RequestRefused("queue_full", f"{waiting} constraints wait to be compiled")


def _to_the_author(structured: Structured, wrong: str) -> str:
    """The compiler's complaint without what only the compiler's notation has."""
    if structured.kind == "grammar":
        hint = "; this is GBNF, and Lark's notation is wanted: 'start: ...'" if "::=" in structured.text else ""
        return wrong + hint
    wrong = re.sub(r"^line \d+, column \d+: ", "", wrong)
    wrong = wrong.removeprefix("failed to compile JSON schema: ")
    if unsupported := re.fullmatch(r"Unimplemented keys: \[(.*)\]", wrong):
        return f"not supported in a schema: {unsupported[1]}"
    if wrong.startswith("oneOf constraints are not supported"):
        return "not supported in a schema: oneOf with alternatives that may both fit; use anyOf"
    if external := re.match(r"Resource '(.*)' is not present", wrong):
        return f"not supported in a schema: $ref to another document, {external[1]}"
    return wrong
