"""Texts as models write them, and what is in them: of every dialect the usual ones and those that went wrong."""

from __future__ import annotations

from dataclasses import dataclass

from quire.text.dialects import CallArguments, CallBegins, Content, Dialects, Part, Reasoning, Tool, joined

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "metric": {"type": "boolean"},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
NOTHING = Tool("get_time", {})
MANY = Tool(
    "store",
    {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
            "size": {"type": ["number", "null"]},
            "of": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "kind": {"enum": ["a", "b"]},
            "where": {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False},
            "free": {},
        },
        "$defs": {"tag": {"type": "string", "maxLength": 3}},
    },
)
TOOLS = (WEATHER, NOTHING, MANY)


@dataclass(frozen=True)
class Case:
    """A text and its parts."""

    dialects: Dialects
    text: str
    parts: tuple[Part, ...]
    opened: bool = False
    forced: bool = False
    """The dialect's own grammar of forced calls must allow it."""

    @property
    def name(self) -> str:
        return f"{self.dialects.tools}-{self.text[:40]!r}"


def say(text: str) -> Part:
    return Content(text)


def think(text: str) -> Part:
    return Reasoning(text)


def calls(*given: tuple[str, str]) -> list[Part]:
    """Calls by name and arguments, counted from 0."""
    parts: list[Part] = []
    for index, (name, arguments) in enumerate(given):
        parts += [CallBegins(index, name), *([CallArguments(index, arguments)] if arguments else [])]
    return parts


def _case(
    tools: str, text: str, *parts: Part, reasoning: str | None = None, opened: bool = False, forced: bool = False
) -> Case:
    return Case(Dialects(tools, reasoning), text, tuple(joined(parts)), opened, forced)


OSLO = '{"city": "Oslo"}'
TRICKY = '{"city": "a\\"}]</tool_call>[TOOL_CALLS]<|call|>\\\\", "x": [{"é☃🦊": "\\u00e9}"}, null, -1.5e3]}'
"""Signs and marks inside strings, escapes, what is not ASCII."""
_ONE = f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>'

HERMES = [
    _case("hermes", "Hello, <b>world</b>! 1 < 2 <tool", say("Hello, <b>world</b>! 1 < 2 <tool")),
    _case("hermes", " \n kept as it is \n", say(" \n kept as it is \n")),
    _case("hermes", _ONE, *calls(("get_weather", OSLO)), forced=True),
    _case("hermes", f"{_ONE}\n{_ONE}\n", *calls(("get_weather", OSLO), ("get_weather", OSLO))),
    _case("hermes", f"Let me see.\n\n{_ONE}", say("Let me see."), *calls(("get_weather", OSLO))),
    _case("hermes", f"A\n{_ONE}\n B", say("A"), *calls(("get_weather", OSLO)), say("\n B")),
    _case("hermes", f"{_ONE}\n B\n", *calls(("get_weather", OSLO)), say("B\n")),
    _case("hermes", f'<tool_call>{{"arguments":{TRICKY},"name":"é"}}</tool_call>', *calls(("é", TRICKY))),
    _case(
        "hermes", f'<tool_call> {{"name":"f","parameters":{TRICKY},"id":[1]}} </tool_call>', *calls(("f", TRICKY))
    ),
    _case(
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', *calls(("f", '{"a": 1}'))
    ),
    _case(  # halves of characters, and a whole one
        "hermes",
        r'<tool_call>{"name": "f\ud800", "arguments": "{\"a\": \"\ud83e\udd8a\udd8a\", \"b\": \"\\ud800\"}"}'
        "</tool_call>",
        *calls(("f\ufffd", '{"a": "🦊\ufffd", "b": "' + r'\ud800"}')),
    ),
    _case("hermes", '<tool_call>{"name": "f"}</tool_call>', *calls(("f", "{}"))),
    _case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}</tool_call>',
        *calls(("f", "{}"), ("g", "{}")),
    ),
    _case(
        "hermes",
        f"<think>\nIt says <tool_call>{{.\n</think>\n\n{_ONE}",
        think("It says <tool_call>{."),
        *calls(("get_weather", OSLO)),
        reasoning="think",
        forced=True,
    ),
    _case(
        "hermes",
        f"so</think>{_ONE}",
        think("so"),
        *calls(("get_weather", OSLO)),
        reasoning="think",
        opened=True,
        forced=True,
    ),
    # what went wrong
    _case("hermes", "<tool_call>\nno JSON</tool_call> x", say("<tool_call>\nno JSON</tool_call> x")),
    _case(
        "hermes",
        '<tool_call>{"nam": "f", "arguments": {}}</tool_call>',
        say('<tool_call>{"nam": "f", "arguments": {}}</tool_call>'),
    ),
    _case("hermes", f'<tool_call>{{"x": {_ONE}', say('<tool_call>{"x":'), *calls(("get_weather", OSLO))),
    _case("hermes", '<tool_call>{"name": "f', say('<tool_call>{"name": "f')),
    _case("hermes", '<tool_call>{"name": 5}</tool_call>', say('<tool_call>{"name": 5}</tool_call>')),
    _case("hermes", '<tool_call>{"name": "f", "argu', CallBegins(0, "f")),
    _case("hermes", '<tool_call>{"name": "f", oops</tool_call> x', *calls(("f", "oops")), say("x")),
    _case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": [1}</tool_call>x',
        *calls(("f", '{"a": [1}')),
        say("x"),
    ),
    _case("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', *calls(("f", '{"a": 1}'))),
    _case("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>', *calls(("f", "{}")), say("}")),
    _case(
        "hermes",
        f'<tool_call>{{"name": "f", "arguments": {{}}\n{_ONE}',
        *calls(("f", "{}"), ("get_weather", OSLO)),
    ),
    _case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}, "arguments": {"b": 1}}</tool_call>',
        *calls(("f", "{}")),
        say('"arguments": {"b": 1}}'),
    ),
]

_BARE = f'{{"name": "get_weather", "parameters": {OSLO}}}'
LLAMA = [
    _case("llama3_json", "Hello {there}", say("Hello {there}")),
    _case("llama3_json", _BARE, *calls(("get_weather", OSLO)), forced=True),
    _case("llama3_json", f" \n{_BARE}; {_BARE}\n{_BARE}\n", *calls(*[("get_weather", OSLO)] * 3)),
    _case("llama3_json", f"{_BARE} So.", *calls(("get_weather", OSLO)), say("So.")),
    _case(
        "llama3_json", f'<|python_tag|>{{"name": "unknown", "parameters": {TRICKY}}}', *calls(("unknown", TRICKY))
    ),
    _case("llama3_json", f"Well: <|python_tag|>{_BARE}", say("Well:"), *calls(("get_weather", OSLO))),
    _case(
        "llama3_json",
        f'{{"type": "function", "parameters": {OSLO}, "name": "get_weather"}}',
        *calls(("get_weather", OSLO)),
    ),
    _case(
        "llama3_json", '{"name": "unknown", "parameters": {}} x', say('{"name": "unknown", "parameters": {}} x')
    ),
    _case(
        "llama3_json", '{"city": "Oslo", "name": "get_weather"}', say('{"city": "Oslo", "name": "get_weather"}')
    ),
    _case("llama3_json", f'{_BARE}; {{"a": 1}}', *calls(("get_weather", OSLO)), say('; {"a": 1}')),
    _case("llama3_json", '<|python_tag|>print("x")', say('<|python_tag|>print("x")')),
    _case(
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Os',
        *calls(("get_weather", '{"city": "Os')),
    ),
    _case("llama3_json", ' {"name": "get', say(' {"name": "get')),
]

MISTRAL = [
    _case("mistral", "No [TOOLS] here [TOOL_CALL", say("No [TOOLS] here [TOOL_CALL")),
    _case(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {OSLO}}}]',
        *calls(("get_weather", OSLO)),
        forced=True,
    ),
    _case(
        "mistral",
        f'I look.[TOOL_CALLS][{{"name": "f", "arguments": {TRICKY}}}, '
        '{"arguments": {}, "name": "g", "id": "x1"}]\n',
        say("I look."),
        *calls(("f", TRICKY), ("g", "{}")),
    ),
    _case("mistral", f"[TOOL_CALLS]f[ARGS]{TRICKY}[TOOL_CALLS]g{{}}", *calls(("f", TRICKY), ("g", "{}"))),
    _case("mistral_args", f"[TOOL_CALLS]get_weather[ARGS]{OSLO}", *calls(("get_weather", OSLO)), forced=True),
    _case("mistral_args", f"[TOOL_CALLS]get_weather[CALL_ID]123[ARGS]{OSLO}", *calls(("get_weather", OSLO))),
    _case(
        "mistral_args",
        f"[THINK]hm [TOOL_CALLS][/THINK]A.[TOOL_CALLS]get_weather[ARGS]{OSLO}",
        think("hm [TOOL_CALLS]"),
        say("A."),
        *calls(("get_weather", OSLO)),
        reasoning="mistral",
    ),
    _case("mistral", "[TOOL_CALLS] [1, 2]", say("[TOOL_CALLS] [1, 2]")),
    _case("mistral", "[TOOL_CALLS] what?", say("[TOOL_CALLS] what?")),
    _case("mistral", f"[TOOL_CALLS][TOOL_CALLS]f{OSLO}", say("[TOOL_CALLS]"), *calls(("f", OSLO))),
    _case("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, 2', *calls(("f", '{"a": [1, 2'))),
    _case("mistral", "[TOOL_CALLS]f[ARGS]oops[TOOL_CALLS]g[ARGS]", *calls(("f", "oops"), ("g", ""))),
    _case("mistral", "[TOOL_CALLS]get", say("[TOOL_CALLS]get")),
    _case("mistral", '[TOOL_CALLS]f{"a": [[1[TOOL_CALLS]g{}', *calls(("f", '{"a": [[1'), ("g", "{}"))),
]


def _tag(name: str, *values: tuple[str, str]) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


CODER = [
    _case("qwen3_coder", "if a <b and <function", say("if a <b and <function")),
    _case("qwen3_coder", _tag("get_weather", ("city", "Oslo")), *calls(("get_weather", OSLO)), forced=True),
    _case(
        "qwen3_coder",
        f"See:\n{_tag('get_time')}\n{_tag('f')}",
        say("See:"),
        *calls(("get_time", "{}"), ("f", "{}")),
    ),
    _case(
        "qwen3_coder",
        _tag(
            "get_weather",
            ("city", '\n 1 < 2\t"é☃🦊"\\n</function></tool_call>\n'),
            ("days", " 3 "),
            ("metric", "True"),
        ),
        *calls(
            (
                "get_weather",
                '{"city": "\\n 1 < 2\\t\\"é☃🦊\\"\\\\n</function></tool_call>\\n", "days": 3, "metric": true}',
            )
        ),
    ),
    _case(
        "qwen3_coder",
        _tag(
            "store",
            ("tags", '["a", "b"]'),
            ("size", "None"),
            ("of", "12"),
            ("kind", "a"),
            ("where", "{'x': 1}"),
            ("free", "7"),
        ),
        *calls(
            ("store", '{"tags": ["a", "b"], "size": null, "of": 12, "kind": "a", "where": {"x": 1}, "free": "7"}')
        ),
    ),
    _case(
        "qwen3_coder",
        _tag("store", ("tags", "a, b"), ("size", "big"), ("of", "x"), ("where", "[1]"), ("more", "1")),
        *calls(("store", '{"tags": "a, b", "size": "big", "of": "x", "where": "[1]", "more": "1"}')),
    ),
    _case("qwen3_coder", _tag("f", ("first name", "é")), *calls(("f", '{"first name": "é"}'))),
    _case("qwen3_coder", "<function=f><parameter=a>1</parameter></function>", *calls(("f", '{"a": "1"}'))),
    _case("qwen3_coder", f"<tool_call><function=f>{TRICKY}</function></tool_call>", *calls(("f", TRICKY))),
    _case("qwen3_coder", "<tool_call>\n{}</tool_call>", say("<tool_call>\n{}</tool_call>")),
    _case("qwen3_coder", "<tool_call>\n<function=a b>", say("<tool_call>\n<function=a b>")),
    _case(
        "qwen3_coder",
        "<function=f>x <parameter=a>1</parameter></tool_call>",
        *calls(("f", '{"a": "1"}')),
        say("x"),
    ),
    _case(
        "qwen3_coder",
        "A\n<tool_call><function=f>\n<parameter=a>1</parameter>\nand also\n<parameter=b c>2</parameter>\n"
        "<parameter=d\n</function></tool_call> B",
        say("A"),
        *calls(("f", '{"a": "1", "b c": "2"}')),
        say("\nand also\n\n<parameter=d B"),
    ),
    _case(
        "qwen3_coder",
        '<function=f>{"a": 1}\n<parameter=b>2</parameter></function>',
        *calls(("f", '{"a": 1}')),
        say("<parameter=b>2</parameter>"),
    ),
    _case(
        "qwen3_coder",
        "<tool_call><function=f><parameter=a>1</parameter><tool_call><function=g><parameter=b>2</parameter>",
        *calls(("f", '{"a": "1"}'), ("g", '{"b": "2"')),
    ),
    _case(
        "qwen3_coder", "<function=get_weather>\n<parameter=city>\nOs\n", *calls(("get_weather", '{"city": "Os\\n'))
    ),
    _case("qwen3_coder", "<function=get_weather>\n<parameter=days>\n1", *calls(("get_weather", '{"days": 1'))),
]

SEED = [
    _case(
        "seed",
        "<seed:think>so</seed:think>Ok\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n"
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
        think("so"),
        say("Ok"),
        *calls(("get_weather", '{"city": "Oslo", "days": 2}')),
        reasoning="seed",
    ),
    _case(
        "seed",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n</function>\n</seed:tool_call>",
        *calls(("get_weather", OSLO)),
        forced=True,
    ),
]

PYTHONIC = [
    _case("pythonic", "[1] and [2]", say("[1] and [2]")),
    _case("pythonic", '[get_weather(city="Oslo")]', *calls(("get_weather", OSLO)), forced=True),
    _case(
        "pythonic",
        "[get_weather(city='O\\'s, (é☃🦊)', days=2, metric=True), get_time()]\n",
        *calls(("get_weather", '{"city": "O\'s, (é☃🦊)", "days": 2, "metric": true}'), ("get_time", "{}")),
    ),
    _case(
        "pythonic",
        "[store(tags=['a', \"b)\"], size=None, where={'x': [1, (2, 3)]}, of=-1.5e3, free=true)]",
        *calls(
            (
                "store",
                '{"tags": ["a", "b)"], "size": null, "where": {"x": [1, [2, 3]]}, "of": -1.5e3, "free": true}',
            )
        ),
    ),
    _case("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", *calls(("f", '{"a": 1}'))),
    _case("pythonic", "So: <|python_start|>[get_time()] x", say("So:"), *calls(("get_time", "{}")), say(" x")),
    _case("pythonic", "[get_time(a=foo(1, 2) + x)]", *calls(("get_time", '{"a": "foo(1, 2) + x"}'))),
    _case(
        "pythonic", "[get_time(größe=1, gro\u0308ße=2)]", *calls(("get_time", '{"größe": 1, "gro\u0308ße": 2}'))
    ),
    _case("pythonic", r"[get_time(a='\d+', b=r'\s')]", *calls(("get_time", r'{"a": "\\d+", "b": "\\s"}'))),
    _case(
        "pythonic",
        r"""[get_time(a='\ud83e\udd8a', b='\ud83e.', c="\ud83e")]""",
        *calls(("get_time", r'{"a": "🦊", "b": "' + "\ufffd" + r'.", "c": "\ud83e"}')),
    ),
    _case("pythonic", "[get_time(a b=1)]", say("[get_time(a b=1)]")),
    _case("pythonic", "[unknown(a=1)]", say("[unknown(a=1)]")),
    _case("pythonic", "[get_time (a=1)]", say("[get_time (a=1)]")),
    _case("pythonic", "[get_time(5)]", say("[get_time(5)]")),
    _case("pythonic", "[get_time(), unknown()]", *calls(("get_time", "{}")), say(", unknown()]")),
    _case("pythonic", "[get_time(a=1, 'b')] x", *calls(("get_time", "{\"a\": 1, 'b'}")), say("x")),
    _case("pythonic", '[get_weather(city="Os', *calls(("get_weather", '{"city": "Os'))),
    _case("pythonic", "[get_weather(", say("[get_weather(")),
]

_B, _E = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_C, _S, _D = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _fenced(name: str, arguments: str) -> str:
    return f"{_C}function{_S}{name}\n```json\n{arguments}\n```{_D}"


DEEPSEEK = [
    _case("deepseek_v3", "a <｜tool | b", say("a <｜tool | b")),
    _case("deepseek_v3", f"{_B}{_fenced('get_weather', OSLO)}{_E}", *calls(("get_weather", OSLO)), forced=True),
    _case(
        "deepseek_v3",
        f"I see.\n\n{_B}{_fenced('f', TRICKY)}\n{_fenced('g', '{}')}{_E}",
        say("I see."),
        *calls(("f", TRICKY), ("g", "{}")),
    ),
    _case("deepseek_v3", f'{_C}function{_S}f\n```json\n{{"a": 1', *calls(("f", '{"a": 1'))),
    _case(
        "deepseek_v3", f"{_C}other{_S}f\n```json\n{{}}\n```{_D}", say(f"{_C}other{_S}f\n```json\n{{}}\n```{_D}")
    ),
    _case("deepseek_v3", f"{_C}function{_S}f\noops\n{_D} x", *calls(("f", "oops\n")), say("x")),
    _case("deepseek_v31", f"{_B}{_C}get_weather{_S}{OSLO}{_D}{_E}", *calls(("get_weather", OSLO)), forced=True),
    _case(
        "deepseek_v31",
        f"so\n</think>Fine.{_B}{_C}f{_S}{TRICKY}{_D}{_C}g{_S}{_D}{_E}",
        think("so"),
        say("Fine."),
        *calls(("f", TRICKY), ("g", "{}")),
        reasoning="think",
        opened=True,
    ),
    _case("deepseek_v31", f"{_B}nothing{_E}", say(f"{_B}nothing{_E}")),
    _case("deepseek_v31", f"{_C}f{_D} x", say(f"{_C}f{_D} x")),
    _case("deepseek_v31", f"{_C}f{_S}{OSLO} and{_D} x", *calls(("f", OSLO)), say("and x")),
    _case("deepseek_v31", f"{_B}{_C}f", say(f"{_B}{_C}f")),
    _case(
        "kimi_k2",
        "Ok <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{OSLO}<|tool_call_end|><|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{TRICKY}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        say("Ok"),
        *calls(("get_weather", OSLO), ("f", TRICKY)),
    ),
    _case(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{OSLO}<|tool_call_end|><|tool_calls_section_end|>",
        *calls(("get_weather", OSLO)),
        forced=True,
    ),
]

_TO = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
_NEXT = "<|start|>assistant"
HARMONY = [
    _case("harmony", "<|channel|>final<|message|>Hello {x}.<|return|>", say("Hello {x}."), reasoning="harmony"),
    _case("harmony", "<|channel|>final<|message|> Hel <|", say(" Hel <|"), reasoning="harmony"),
    _case(
        "harmony",
        f"<|channel|>analysis<|message|>\nhm {{<|end|>{_NEXT}<|channel|>final<|message|>So.",
        think("hm {"),
        say("So."),
        reasoning="harmony",
    ),
    _case("harmony", f"{_TO}{OSLO}", *calls(("get_weather", OSLO)), reasoning="harmony", forced=True),
    _case(
        "harmony",
        f"<|channel|>analysis<|message|>a<|end|>{_NEXT}{_TO}{OSLO}",
        think("a"),
        *calls(("get_weather", OSLO)),
        reasoning="harmony",
        forced=True,
    ),
    _case(
        "harmony",
        f"<|channel|>analysis<|message|>a<|end|>{_NEXT}<|channel|>analysis<|message|>b <|end|>{_NEXT}"
        f"<|channel|>commentary<|message|>I look.<|end|>{_NEXT}{_TO}{TRICKY}<|call|>",
        think("a\nb"),
        say("I look."),
        *calls(("get_weather", TRICKY)),
        reasoning="harmony",
    ),
    _case(
        "harmony",
        f" to=functions.f<|channel|>commentary json<|message|>{OSLO}<|call|>"
        f"{_NEXT} to=g<|channel|>commentary<|message|>x<|call|>",
        *calls(("f", OSLO), ("g", "x")),
        reasoning="harmony",
    ),
    _case(
        "harmony",
        f"so<|end|>{_NEXT}<|channel|>commentary<|message|>One.<|end|>{_NEXT}<|channel|>final<|message|>Two.\n",
        think("so"),
        say("One.\nTwo.\n"),
        reasoning="harmony",
        opened=True,
    ),
    _case("harmony", "Plain, to=x <|chan", say("Plain, to=x <|chan"), reasoning="harmony"),
    _case("harmony", "to=x", say("to=x"), reasoning="harmony"),
    _case(
        "harmony", f"<|channel|>analysis<|message|>a<|end|>{_NEXT}<|channel|>fin", think("a"), reasoning="harmony"
    ),
    _case("harmony", "<|channel|>analysis<|end|>x", say("<|channel|>analysis<|end|>x"), reasoning="harmony"),
    _case("harmony", f'{_TO}{{"city": "Os', *calls(("get_weather", '{"city": "Os')), reasoning="harmony"),
    _case("harmony", "<|start|>This is, no header.", say("<|start|>This is, no header."), reasoning="harmony"),
]


def _thought(reasoning: str, text: str, *parts: Part, opened: bool = False) -> Case:
    return Case(Dialects(None, reasoning), text, tuple(joined(parts)), opened)


THOUGHTS = [
    _thought("think", "Hello </think> <think>x</think>", say("Hello </think> <think>x</think>")),
    _thought("think", "<think>\n\n</think>\n\nHi ", say("Hi ")),
    _thought("think", " \n<think>\n a\n\nb <thi </ \n</think> \n Hi\n", think("a\n\nb <thi </"), say("Hi\n")),
    _thought("think", "<think>a</think>\n<think>b</think>c<think>d", think("a\nb"), say("c<think>d")),
    _thought("think", "\n<think>a</think>b", think("a"), say("b"), opened=True),
    _thought("think", "a </think", think("a </think"), opened=True),
    _thought("think", "<think>a \n", think("a \n")),
    _thought("think", " \n <thin", say(" \n <thin")),
    _thought("think", "<think>a</think> \n ", think("a")),
    _thought("think", " ", say(" ")),
    _thought("deepseek_r1", "a</think>b", think("a"), say("b")),
    _thought("deepseek_r1", "\n<think>\na</think>b", think("a"), say("b")),
    _thought("mistral", "[THINK]é☃🦊[/THINK]x", think("é☃🦊"), say("x")),
    _thought("seed", "<seed:think>a</seed:think>x", think("a"), say("x")),
    _thought("cohere", "<|START_THINKING|>a<|END_THINKING|>x", think("a"), say("x")),
    _thought("granite", "Here is my thought process: a\n\nHere is my response: x", think("a"), say("x")),
]

CASES = [*HERMES, *LLAMA, *MISTRAL, *CODER, *SEED, *PYTHONIC, *DEEPSEEK, *HARMONY, *THOUGHTS]
