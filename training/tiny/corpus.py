"""What the built-in model is trained on.

Five sources, each a generator or a file beside this one:

* English: prose found in the installed Python's own standard library (docstrings, comment blocks and
  `pydoc_data.topics`), read at training time and never committed, and `paragraphs.txt`, written for this corpus.
* Questions with short answers, `qa.txt`, each with several phrasings.
* Tool calls: a handful of tools, filled with generated values, plus tools with made-up names.
* Sums up to 99, each with its working in a `<think>` part.
* Requests to repeat some words, which teach copying, the skill under every tool call.

Every generator takes a `random.Random`, so a seed decides the whole corpus. Values whose hash falls into one of
eight classes are held out: a training example never contains them, and the measured tool calls and sums always do.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to know by heart: ways to ask, and the answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(slots=True)
class Chat:
    """A conversation whose assistant messages are to be learned; the last message is always the assistant's."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = True


def held_out(value: str) -> bool:
    """Whether a value is kept out of training: one in eight, decided by its hash."""
    return hashlib.sha256(value.encode()).digest()[0] % 8 == 0


# --- English --------------------------------------------------------------------------------------

_ALLOWED = re.compile(r"[A-Za-z ,.;:'\"()?!-]")
_SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "encodings", "turtledemo"}


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences and not as code, a table or a signature."""
    words = paragraph.split()
    if len(words) < 8 or not paragraph[0].isupper() or paragraph[-1] not in ".:?!":
        return False
    if any(mark in paragraph for mark in (">>>", "::", "==", "->", "__", "http", "|", "...")):
        return False
    plain = sum(1 for char in paragraph if _ALLOWED.match(char))
    wordy = sum(1 for word in words if re.fullmatch(r"[(\"']?[A-Za-z][A-Za-z'-]*[,.;:?!)\"']*", word))
    return plain >= 0.93 * len(paragraph) and wordy >= 0.8 * len(words)


def paragraphs_of(text: str) -> Iterator[str]:
    """The prose paragraphs of a documentation string, each joined into one line."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.replace("``", "").replace("`", "").replace("*", "").split())
        if line and is_prose(line):
            yield line


def _comment_blocks(path: Path) -> Iterator[str]:
    """Runs of full-line comments of a source file, without their marks."""
    block: list[str] = []
    with tokenize.open(path) as file:
        for line in file:
            stripped = line.strip()
            if stripped.startswith("# "):
                block.append(stripped[2:])
            elif stripped == "#":
                block.append("")
            elif block:
                yield "\n".join(block)
                block = []
    if block:
        yield "\n".join(block)


def _extension_docs() -> Iterator[list[str]]:
    """The documentation strings of the modules written in C, one list per module."""
    shared = Path(sysconfig.get_path("stdlib"), "lib-dynload")
    names = set(sys.builtin_module_names) | {path.name.partition(".")[0] for path in shared.glob("*.so")}
    for name in sorted(names):
        if name.startswith(("_test", "xx")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # an extension whose system library is not installed
        things: list[Any] = [module]
        for key in sorted(vars(module)):
            value = vars(module)[key]
            things.append(value)
            if inspect.isclass(value):
                things += [vars(value)[member] for member in sorted(vars(value))]
        docs = (getattr(thing, "__doc__", None) for thing in things)
        yield [doc for doc in docs if isinstance(doc, str)]


def english_documents() -> list[str]:
    """The prose of the installed standard library, one document per source file or topic, without repetitions."""
    seen: set[str] = set()
    documents: list[str] = []

    def add(texts: list[str], least_words: int = 8) -> None:
        fresh: list[str] = []
        for text in texts:
            for paragraph in paragraphs_of(text):
                if paragraph not in seen and len(paragraph.split()) >= least_words:
                    seen.add(paragraph)
                    fresh.append(paragraph)
        if fresh:
            documents.append("\n\n".join(fresh))

    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        add([topics[name]])
    for docs in _extension_docs():
        add(docs)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if _SKIPPED_FOLDERS & parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
            comments = list(_comment_blocks(path))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the test suite contains files that are broken on purpose
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        # the one-line remarks of the test suite teach little
        add([string for string in strings if string] + comments, 14 if {"test", "tests"} & parts else 8)
    return documents


def read_paragraphs(path: Path = HERE / "paragraphs.txt") -> list[tuple[str, str]]:
    """The written paragraphs as (title, text)."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")[1:]
    return [(title, " ".join(text.split("\n"))) for title, _, text in (b.strip().partition("\n") for b in blocks)]


# --- Questions and answers ------------------------------------------------------------------------


def read_entries(path: Path = HERE / "qa.txt") -> list[Entry]:
    """The questions and answers of `qa.txt`."""
    entries: list[Entry] = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        questions = tuple(line[3:] for line in lines if line.startswith("Q: "))
        answers = [line[3:] for line in lines if line.startswith("A: ")]
        if not lines:
            continue
        if not questions or len(answers) != 1 or len(questions) + 1 != len(lines):
            raise ValueError(f"{path.name}: a block needs Q lines and one A line, found {lines}")
        entries.append(Entry(questions, answers[0]))
    return entries


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about Quire.",
    "Be polite and short.",
)


def _vary(rng: random.Random, question: str) -> str:
    """The question as written, or with a small change of the kind people make."""
    roll = rng.random()
    if roll < 0.72:
        return question
    if roll < 0.80:
        return question.lower()
    if roll < 0.88:
        return question.rstrip("?.!")
    if roll < 0.92:
        return question.lower().rstrip("?.!")
    return rng.choice(("Please tell me: ", "Hello. ", "Question: ", "A question: ", "Hi! ")) + question


def _system(rng: random.Random) -> list[dict[str, Any]]:
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []


def question_chat(rng: random.Random, entries: list[Entry], turns: int = 1) -> Chat:
    messages = _system(rng)
    for _ in range(turns):
        entry = rng.choice(entries)
        messages.append({"role": "user", "content": _vary(rng, rng.choice(entry.questions))})
        messages.append({"role": "assistant", "content": entry.answer})
    return Chat(messages, thinking=turns > 1 or rng.random() < 0.9)


PARAGRAPH_ASKS = (
    "Write a short paragraph about {}.",
    "Write a paragraph about {}.",
    "Tell me something about {}.",
    "Write a few sentences about {}.",
)


def paragraph_chat(rng: random.Random, paragraphs: list[tuple[str, str]]) -> Chat:
    title, text = rng.choice(paragraphs)
    ask = rng.choice(PARAGRAPH_ASKS).format(title)
    return Chat([*_system(rng), {"role": "user", "content": ask}, {"role": "assistant", "content": text}])


# --- Sums -----------------------------------------------------------------------------------------

SUM_ASKS = {
    "+": ("What is {} + {}?", "{} + {} = ?", "How much is {} plus {}?", "What is {} plus {}?", "Compute {} + {}."),
    "-": (
        "What is {} - {}?",
        "{} - {} = ?",
        "How much is {} minus {}?",
        "What is {} minus {}?",
        "Compute {} - {}.",
    ),
    "*": (
        "What is {} * {}?",
        "{} * {} = ?",
        "How much is {} times {}?",
        "What is {} times {}?",
        "Compute {} * {}.",
    ),
}


def solve(op: str, a: int, b: int) -> tuple[str, int]:
    """The working of a sum, one equation a line (ones, tens, both), and its result."""
    if op == "*":
        return f"{a} * {b} = {a * b}", a * b
    tens_b, ones_b = b // 10 * 10, b % 10
    if op == "-":
        if tens_b and ones_b:
            return f"{a} - {tens_b} = {a - tens_b}\n{a - tens_b} - {ones_b} = {a - b}", a - b
        return f"{a} - {b} = {a - b}", a - b
    tens, ones = [t for t in (a // 10 * 10, tens_b) if t], [o for o in (a % 10, ones_b) if o]
    if len(tens) + len(ones) <= 2:
        return f"{a} + {b} = {a + b}", a + b
    lines = [f"{part[0]} + {part[1]} = {sum(part)}" for part in (ones, tens) if len(part) == 2]
    return "\n".join([*lines, f"{sum(tens)} + {sum(ones)} = {a + b}"]), a + b


def sum_is_held_out(op: str, a: int, b: int) -> bool:
    """Whether a sum is kept out of training: one in eight, except products and single digits, which are tables."""
    return op != "*" and max(a, b) >= 10 and held_out(f"{a} {op} {b}")


def draw_sum(rng: random.Random, wanted_held_out: bool) -> tuple[str, int, int]:
    while True:
        op = rng.choices("+-*", (6, 3, 1))[0]
        if op == "*":
            a, b = rng.randint(0, 10), rng.randint(0, 10)
        else:
            top = 9 if rng.random() < 0.25 else 99
            a, b = rng.randint(0, top), rng.randint(0, top)
        if op == "-" and a < b:
            a, b = b, a
        if sum_is_held_out(op, a, b) == wanted_held_out:
            return op, a, b


def sum_chat(rng: random.Random, wanted_held_out: bool = False) -> Chat:
    op, a, b = draw_sum(rng, wanted_held_out)
    working, result = solve(op, a, b)
    thinking = wanted_held_out or rng.random() < 0.9
    answer = f"<think>\n{working}\n</think>\n\n{result}" if thinking else str(result)
    asks = SUM_ASKS[op]
    ask = (asks[0] if rng.random() < 0.4 else rng.choice(asks)).format(a, b)
    system = [] if wanted_held_out else _system(rng)
    return Chat(
        [*system, {"role": "user", "content": ask}, {"role": "assistant", "content": answer}], thinking=thinking
    )


# --- Tools ----------------------------------------------------------------------------------------

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call: its signature, how people ask for it, and what comes back."""

    name: str
    description: str
    parameters: dict[str, str]  # name -> JSON type
    asks: tuple[str, ...]
    draw: Callable[[random.Random], Arguments]
    result: Callable[[random.Random, Arguments], dict[str, Any]]
    answer: str  # formatted with the arguments and the result

    def schema(self) -> dict[str, Any]:
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _words(text: str) -> list[str]:
    return text.split()


_CITIES = _words(
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Warsaw "
    "Prague Budapest Athens Istanbul Cairo Nairobi Lagos Accra Tunis Dakar Delhi Mumbai Tokyo Osaka Kyoto "
    "Seoul Beijing Shanghai Bangkok Hanoi Manila Jakarta Sydney Melbourne Perth Auckland Toronto Montreal "
    "Vancouver Chicago Boston Denver Seattle Austin Dallas Houston Miami Atlanta Lima Quito Bogota "
    "Santiago Havana Zurich Geneva Basel Bern Munich Hamburg Cologne Leipzig Dresden Milan Turin Naples "
    "Venice Florence Lyon Nice Bordeaux Porto Seville Valencia Krakow Riga Vilnius Tallinn Kiev Sofia "
    "Zagreb Belgrade Glasgow Leeds Bristol Oxford Cambridge York Bath Cork"
)
_ONSETS = _words(
    "b c d f g h j k l m n p qu r s t v w y z bl br ch cl cr dr fl fr gl gr kl pl pr sc sh sl sn sp st sw th tr wh"
)
_VOWELS = _words("a e i o u a e i o u ai aw ay ea ee ie oa oo ou ow")
_ENDS = _words("b ck d f g k l ld ll m mp n nd ng nt p r rd rk rs rt s sh sk st t th w x y") + [""] * 20


def made_up(rng: random.Random) -> str:
    """A pronounceable word that means nothing, so that copying is learned and not a list."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3))]
    return "".join(parts) + rng.choice(_ENDS)


def _city(rng: random.Random) -> str:
    return rng.choice(_CITIES) if rng.random() < 0.5 else made_up(rng).capitalize()


_ADJECTIVES = _words(
    "paged small large cheap open fast old new local remote green blue simple static dynamic cold warm"
)
_NOUNS = _words(
    "attention caches engines routers books trains recipes gardens models tokens queues tables kernels "
    "blocks rivers mountains bridges ships markets batteries sensors maps tickets hotels museums "
    "festivals printers keyboards"
)


def _query(rng: random.Random) -> str:
    words = [rng.choice(_ADJECTIVES), rng.choice(_NOUNS) if rng.random() < 0.7 else made_up(rng)]
    if rng.random() < 0.3:
        words += ["in", _city(rng)]
    return " ".join(words)


_FAMILIES = _words("llama qwen mistral gemma phi tiny falcon granite")


def _model(rng: random.Random) -> str:
    family = rng.choice(_FAMILIES) if rng.random() < 0.6 else made_up(rng)
    return f"{family}-{rng.randint(1, 99)}b"


_PEOPLE = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karen Leo Maria Nora Oscar Paula Rosa Sam Tina Victor"
)


def _person(rng: random.Random) -> str:
    return rng.choice(_PEOPLE) if rng.random() < 0.6 else made_up(rng).capitalize()


def _path(rng: random.Random) -> str:
    folder, ending = rng.choice(("data", "home", "tmp", "logs", "srv")), rng.choice(("txt", "csv", "json", "log"))
    return f"/{folder}/{made_up(rng)}.{ending}"


_OPENINGS = _words(
    "See Buy Bring Find Call Take Send Read Try Remember Forget Meet Ask Watch Book Open Close Clean"
)


def _message(rng: random.Random) -> str:
    opening = rng.choice(_OPENINGS) if rng.random() < 0.7 else made_up(rng).capitalize()
    return f"{opening} the {_query(rng)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(0, 9999))


_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
_STATES = ("ready", "starting", "stalled", "draining")

TOOLS: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Get the current weather in a city.",
        {"city": "string"},
        (
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city}?",
            "Tell me the weather in {city}.",
            "Is it warm in {city}?",
        ),
        lambda rng: {"city": _city(rng)},
        lambda rng, _: {"temperature": rng.randint(0, 35), "sky": rng.choice(_SKIES)},
        "In {city} it is {temperature} degrees and {sky}.",
    ),
    Tool(
        "get_time",
        "Get the local time in a city.",
        {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}.", "What is the local time in {city}?"),
        lambda rng: {"city": _city(rng)},
        lambda rng, _: {"time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"},
        "In {city} it is {time}.",
    ),
    Tool(
        "search",
        "Search the web.",
        {"query": "string"},
        ("Search for {query}.", "Look up {query}.", "Search the web for {query}.", 'Search for "{query}".'),
        lambda rng: {"query": _query(rng)},
        lambda rng, args: {"results": rng.randint(1, 99), "first": f"All about {args['query']}"},
        'I found {results} results. The first is "{first}".',
    ),
    Tool(
        "add",
        "Add two numbers.",
        {"a": "integer", "b": "integer"},
        ("Add {a} and {b}.", "Use the tool to add {a} and {b}.", "Please add {a} and {b}."),
        lambda rng: {"a": rng.randint(0, 999), "b": rng.randint(0, 999)},
        lambda _, args: {"sum": args["a"] + args["b"]},
        "The sum of {a} and {b} is {sum}.",
    ),
    Tool(
        "model_status",
        "Get the status of a served model.",
        {"name": "string"},
        (
            "What is the status of {name}?",
            "Is the model {name} ready?",
            "How is the model {name} doing?",
            "Check the status of {name}.",
        ),
        lambda rng: {"name": _model(rng)},
        lambda rng, _: {"status": rng.choice(_STATES), "replicas": rng.randint(0, 9)},
        "The model {name} is {status} with {replicas} replicas.",
    ),
    Tool(
        "send_message",
        "Send a message to a person.",
        {"to": "string", "text": "string"},
        ('Send "{text}" to {to}.', 'Tell {to}: "{text}"', 'Write a message to {to}: "{text}"'),
        lambda rng: {"to": _person(rng), "text": _message(rng)},
        lambda rng, _: {"sent": True, "id": rng.randint(100, 999)},
        "I sent the message to {to}.",
    ),
    Tool(
        "read_file",
        "Read a file.",
        {"path": "string"},
        ("Read the file {path}.", "What is in the file {path}?", "Open {path}."),
        lambda rng: {"path": _path(rng)},
        lambda rng, _: {"lines": rng.randint(1, 99)},
        "The file {path} has {lines} lines.",
    ),
    Tool(
        "set_timer",
        "Set a timer.",
        {"minutes": "integer"},
        (
            "Set a timer for {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
        ),
        lambda rng: {"minutes": rng.randint(2, 120)},
        lambda _, args: {"set": True},
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "translate",
        "Translate a text.",
        {"text": "string", "language": "string"},
        ('Translate "{text}" into {language}.', 'How do you say "{text}" in {language}?'),
        lambda rng: {
            "text": _query(rng),
            "language": rng.choice(("French", "German", "Spanish", "Italian", "Polish", "Dutch")),
        },
        lambda rng, _: {"translation": f"{made_up(rng)} {made_up(rng)}"},
        'In {language} it is "{translation}".',
    ),
)

_VERBS = ("get", "find", "open", "close", "start", "stop", "delete", "print", "check", "count", "move", "book")
_THINGS = (
    "order",
    "user",
    "ticket",
    "room",
    "device",
    "image",
    "job",
    "account",
    "song",
    "report",
    "printer",
    "door",
)
_KEYS = ("id", "name", "code", "label", "key")


def made_up_tool(rng: random.Random) -> Tool:
    """A tool that exists only in one conversation: its name and parameter must be read from the signature."""
    verb, thing, key = rng.choice(_VERBS), rng.choice(_THINGS), rng.choice(_KEYS)
    value = made_up(rng) if rng.random() < 0.5 else f"{made_up(rng)[:2].upper()}{rng.randint(10, 999)}"
    return Tool(
        f"{verb}_{thing}",
        f"{verb.capitalize()} the {thing} with this {key}.",
        {key: "string"},
        (f"{verb.capitalize()} the {thing} {{{key}}}.", f"Please {verb} the {thing} {{{key}}}."),
        lambda _: {key: value},
        lambda r, _: {"done": True, "number": r.randint(1, 99)},
        f"The {thing} {{{key}}} is done, number {{number}}.",
    )


REPEAT_ASKS = ("Repeat: {}", "Say {}", 'Repeat "{}".', 'Say "{}".', "Repeat after me: {}", "Write {}")


def repeat_chat(rng: random.Random) -> Chat:
    """A request to repeat one to four words, names or numbers."""
    draws = (_query, made_up, _city, _model, _person, _path, _number, _message)
    words: list[str] = []
    wanted = rng.randint(1, 4)
    while len(words) < wanted:
        word = rng.choice(draws)(rng)
        if not held_out(json.dumps(word)):
            words.append(word)
    text = " ".join(words)
    ask = rng.choice(REPEAT_ASKS).format(text)
    return Chat([*_system(rng), {"role": "user", "content": ask}, {"role": "assistant", "content": text}])


def call_text(name: str, arguments: Arguments) -> str:
    """A tool call as the model writes it."""
    body = f'{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'
    return f"<tool_call>\n{body}\n</tool_call>"


def _draw(rng: random.Random, tool: Tool, wanted_held_out: bool) -> Arguments:
    while True:
        arguments = tool.draw(rng)
        if tool.name == "set_timer":  # too few values to hold any out
            return arguments
        if any(held_out(json.dumps(value)) for value in arguments.values()) == wanted_held_out:
            return arguments


def _offered(rng: random.Random, used: Tool | None) -> list[Tool]:
    """One to three tools, the used one among them, in any order."""
    count = rng.choices((1, 2, 3), (5, 3, 2))[0]
    others = [tool for tool in TOOLS if used is None or tool.name != used.name]
    offered = ([] if used is None else [used]) + rng.sample(others, count - (used is not None))
    rng.shuffle(offered)
    return offered


def tool_chat(rng: random.Random, entries: list[Entry]) -> Chat:
    """A conversation with tools: one to four turns, most of them calls, most calls with result and answer."""
    used = made_up_tool(rng) if rng.random() < 0.2 else rng.choice(TOOLS)
    offered = _offered(rng, used)
    messages = _system(rng)
    for turn in range(rng.choices((1, 2, 3, 4), (3, 3, 2, 1))[0]):
        if rng.random() < (0.15 if turn == 0 else 0.25):
            entry = rng.choice(entries)
            messages.append({"role": "user", "content": _vary(rng, rng.choice(entry.questions))})
            messages.append({"role": "assistant", "content": entry.answer})
            continue
        tool = used if turn == 0 else rng.choice(offered)
        made = tool not in TOOLS
        arguments = tool.draw(rng) if made else _draw(rng, tool, wanted_held_out=False)
        if tool.name in ("get_weather", "get_time") and rng.random() < 0.12:
            calls = [arguments, _draw(rng, tool, wanted_held_out=False)]
            ask = tool.asks[0].format(city=f"{calls[0]['city']} and in {calls[1]['city']}")
        else:
            calls = [arguments]
            ask = rng.choice(tool.asks).format(**arguments)
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": "\n".join(call_text(tool.name, args) for args in calls)})
        if rng.random() < 0.75:
            answers: list[str] = []
            for args in calls:
                result = tool.result(rng, args)
                messages.append({"role": "tool", "content": json.dumps(result)})
                answers.append(tool.answer.format(**args, **result))
            messages.append({"role": "assistant", "content": " ".join(answers)})
        else:
            break
    return Chat(messages, [tool.schema() for tool in offered])


@dataclass(frozen=True, slots=True)
class ToolCase:
    """A question for which exactly one call is right."""

    question: str
    tools: list[dict[str, Any]]
    name: str
    arguments: Arguments


def held_out_calls(seed: int, count: int) -> list[ToolCase]:
    """Questions whose values were never trained, spread evenly over the tools."""
    rng = random.Random(seed)
    usable = [tool for tool in TOOLS if tool.name != "set_timer"]
    cases: list[ToolCase] = []
    for index in range(count):
        tool = usable[index % len(usable)]
        arguments = _draw(rng, tool, wanted_held_out=True)
        schemas = [offered.schema() for offered in _offered(rng, tool)]
        cases.append(ToolCase(rng.choice(tool.asks).format(**arguments), schemas, tool.name, arguments))
    return cases


def held_out_sums(seed: int, count: int) -> list[tuple[str, str]]:
    """Sums that were never trained, as (question, full answer)."""
    rng = random.Random(seed)
    chats = [sum_chat(rng, wanted_held_out=True) for _ in range(count)]
    return [(chat.messages[0]["content"], chat.messages[1]["content"]) for chat in chats]
