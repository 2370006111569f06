"""What readers of dialects make of a text: the parts that are in it, however it is cut, and nothing lost."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import bound, examples
from tests.unit.platform.dialect_cases import CASES, OSLO, TOOLS, Case

from quire import builtin
from quire.text import ParamRefused, Tokenizer
from quire.text.dialects import (
    REASONING,
    CallArguments,
    CallBegins,
    Content,
    Dialects,
    Part,
    Plain,
    Reasoning,
    Tool,
    detect,
    joined,
)
from quire.text.dialects import TOOLS as DIALECTS
from quire.text.dialects.literals import python_or_json
from quire.text.markup import Markup
from quire_schemas.dialects import NONE, ReasoningDialect, ToolDialect
from quire_schemas.wire import MAX_STRUCTURED, Structured


def read(dialects: Dialects, pieces: Sequence[str], opened: bool = False) -> list[Part]:
    reader = dialects.reader(TOOLS, opened=opened)
    parts = [part for piece in pieces for part in reader.push(piece)]
    return joined(parts + reader.finish())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_text_has_the_same_parts_however_it_is_cut(case: Case) -> None:
    wanted = list(case.parts)
    assert read(case.dialects, [case.text], case.opened) == wanted
    assert read(case.dialects, list(case.text), case.opened) == wanted, "character by character"
    for cut in range(len(case.text) + 1):
        assert read(case.dialects, [case.text[:cut], "", case.text[cut:]], case.opened) == wanted, cut


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_text_that_ends_anywhere_has_the_same_parts_however_it_is_cut(case: Case) -> None:
    for end in range(len(case.text)):
        text = case.text[:end]
        assert read(case.dialects, [text[: end // 2], text[end // 2 :]], case.opened) == read(
            case.dialects, [text], case.opened
        ), end


def test_every_dialect_has_its_texts() -> None:
    spoken = {name for case in CASES for name in (case.dialects.tools, case.dialects.reasoning)} - {None}
    assert spoken >= set(DIALECTS)
    assert spoken >= set(REASONING) - {"thinking"}, "which differs by its marks alone"


# ── texts made of marks ───────────────────────────────────────────────────────────────────────────────────

PAYLOAD = frozenset("αβγδ")
"""Letters that no format has: they come out as they went in."""
COMMON = ["α", " β\n", "γ ", '"δ"', "{", "}", "[", "]", ",", '"', "\\", " ", "\n", "<", "a", "\\\\"]
COMMON += ["\\ud83d", "\\ude00", '"\\ud83d"']
PIECES: dict[str, list[str]] = {
    "hermes": ['{"name": "f"', '"arguments": ', '{"name": "αβ", "arguments": {"x": "γ'],
    "llama3_json": ['{"name": "get_time"', '"parameters": ', ";", '{"name": "get_weather", "parameters": {"γ'],
    "mistral": ['{"name": "f"', '"arguments": ', "f", '[{"name": "f", "arguments": {"γ": "'],
    "mistral_args": ["f", "αβ", ": "],
    "qwen3_coder": [
        "<function=",
        "<parameter=",
        ">",
        "</parameter>",
        "</function>",
        "get_weather",
        "city",
        "days",
    ],
    "seed": ["<function=", "<parameter=", ">", "</parameter>", "</function>", "get_weather", "days"],
    "pythonic": ["get_weather", "(", ")", "city=", "[get_time(a=", "'", "["],
    "deepseek_v3": ["function", "```", "json", "f\n", "```json\n{"],
    "deepseek_v31": ["f", "α:1"],
    "kimi_k2": ["functions.f", ":0"],
    "harmony": ["analysis", "final", "commentary", " to=functions.f ", "json", "<|start|>assistant"],
}
LOSSY = {"[CALL_ID]"}
"""What stands behind these is part of a form, whatever it is."""


def texts(name: str, reasoning: str | None) -> st.SearchStrategy[list[str]]:
    marks = Dialects(name, reasoning).marks
    pieces = [*COMMON, *PIECES[name], *(mark for mark in marks if mark not in LOSSY)]
    return st.lists(st.sampled_from(pieces), max_size=24)


def payload(text: str) -> str:
    return "".join(char for char in text if char in PAYLOAD)


def given_out(parts: Sequence[Part]) -> str:
    return "".join(part.name if isinstance(part, CallBegins) else part.text for part in parts)


def read_in_any_cuts(data: st.DataObject, dialects: Dialects, text: str, opened: bool) -> list[Part]:
    """What is in a text, the same for all cuts, and in an order that everybody can pass on."""
    whole = read(dialects, [text], opened)
    assert read(dialects, list(text), opened) == whole
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    cuts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(dialects, cuts, opened) == whole
    given_out(whole).encode()  # as all that goes out is UTF-8
    begun = [part.index for part in whole if isinstance(part, CallBegins)]
    assert begun == list(range(len(begun))), "calls are counted"
    for before, part in itertools.pairwise(whole):
        assert not isinstance(part, CallArguments) or isinstance(before, CallBegins), "arguments are one run"
    return whole


@pytest.mark.parametrize("name", PIECES)
@settings(max_examples=examples(80), deadline=None)
@given(data=st.data())
def test_texts_made_of_marks_have_the_same_parts_however_they_are_cut(name: str, data: st.DataObject) -> None:
    reasoning = "harmony" if name == "harmony" else data.draw(st.sampled_from([None, "think"]))
    dialects = Dialects(name, reasoning)
    opened = reasoning is not None and data.draw(st.booleans())
    text = "".join(data.draw(texts(name, reasoning)))
    whole = read_in_any_cuts(data, dialects, text, opened)
    if name != "harmony":  # whose headers have words that are nobody's text
        assert payload(given_out(whole)) == payload(text), "nothing lost, nothing twice, all in order"


@pytest.mark.parametrize("name", PIECES)
@settings(max_examples=examples(80), deadline=None)
@given(data=st.data())
def test_usual_texts_with_something_in_between_have_the_same_parts_too(name: str, data: st.DataObject) -> None:
    """Text before, within and behind calls: the arguments of a call are one run."""
    case = data.draw(st.sampled_from([case for case in CASES if case.dialects.tools == name]))
    pieces = [*COMMON, "α", *PIECES[name], *case.dialects.marks]
    text = case.text
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from(pieces)) + text[at:]
    read_in_any_cuts(data, case.dialects, text, case.opened)


# ── early, and in linear time ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tools", "text", "name_at", "first_argument_at"),
    [
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": 1}}', 'get_time"', "{"),
        ("llama3_json", '{"name": "get_time", "parameters": {"a": 1}}', 'get_time"', "{"),
        ("mistral_args", '[TOOL_CALLS]get_time[ARGS]{"a": 1}', "[ARGS]", "{"),
        ("qwen3_coder", "<tool_call>\n<function=get_time>\n<parameter=a>\nxyz", "get_time>", "a>"),
        ("pythonic", "[get_time(a=1, b=2)]", "a=", "1,"),
        ("deepseek_v31", '<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"a": 1}', "<｜tool▁sep｜>", "{"),
        ("harmony", '<|channel|>commentary to=get_time<|message|>{"a": 1}', "<|message|>", "{"),
    ],
)
def test_a_part_comes_as_soon_as_it_is_certain(
    tools: str, text: str, name_at: str, first_argument_at: str
) -> None:
    reader = Dialects(tools, "harmony" if tools == "harmony" else None).reader(TOOLS)
    seen: dict[type[Part], int] = {}
    for at, char in enumerate(text):
        for part in reader.push(char):
            seen.setdefault(type(part), at + 1)
    name_end = text.index(name_at) + len(name_at)
    assert seen[CallBegins] == name_end
    assert seen[CallArguments] == text.index(first_argument_at, name_end - 1) + len(first_argument_at)


def test_content_is_held_back_only_where_a_mark_may_begin() -> None:
    reader = Dialects("hermes", "think").reader(TOOLS)
    assert reader.push("Hello") == [Content("Hello")]
    assert reader.push(" <too") == []
    assert reader.push("ls>") == [Content(" <tools>")]
    assert reader.push(" ") == []
    assert reader.finish() == [Content(" ")]


def test_a_thought_is_given_on_while_it_is_written() -> None:
    reader = Dialects(None, "think").reader(None, opened=True)
    assert reader.push("\nso ") == [Reasoning("so")]
    assert reader.push("far</thi") == [Reasoning(" far")]
    assert reader.push("nk>\n") == []
    assert reader.push("x") == [Content("x")]


BIG = 1_000_000


@pytest.mark.parametrize(
    ("name", "reasoning", "head", "fill", "tail"),
    [
        ("hermes", None, '<tool_call>{"name": "f", "arguments": {"a": "', "x", '"}}</tool_call>'),
        ("hermes", None, '<tool_call>{"arguments": {"a": "', "<", '"}, "name": "f"}</tool_call>'),
        ("hermes", None, '<tool_call>{"name": "', "n", '"}</tool_call>'),
        ("hermes", None, "x", " ", "x"),
        ("hermes", "think", "<think>", "<", "</think>"),
        ("llama3_json", None, '{"parameters": [', "[", ""),
        ("qwen3_coder", None, "<function=f><parameter=a>", "\n", "</parameter>"),
        ("pythonic", None, '[get_weather(city="', "x", '")]'),
        ("deepseek_v31", None, "<｜tool▁call▁begin｜>", "<", "<｜tool▁sep｜>{}"),
        ("harmony", "harmony", "<|channel|>final", "f", "<|message|>"),
    ],
)
def test_time_is_linear_in_the_text(name: str, reasoning: str | None, head: str, fill: str, tail: str) -> None:
    dialects, size = Dialects(name, reasoning), BIG // 10

    def seconds(length: int) -> float:
        pieces = [*head, *(fill * length), *tail]
        began = time.process_time()
        read(dialects, pieces)
        return time.process_time() - began

    read(dialects, [head + fill * BIG + tail])
    assert seconds(size) < bound(1), "a tenth of what a megabyte takes in pieces of one character"


def test_a_model_without_dialects_says_what_it_writes() -> None:
    assert isinstance(Dialects().reader(TOOLS), Plain)
    text = f'<think>a</think><tool_call>{{"name": "f", "arguments": {OSLO}}}</tool_call>'
    assert read(Dialects(), [text]) == [Content(text)]
    assert joined(Dialects("hermes").reader(None).push(text)) == [Content(text)], "nobody asked for calls"
    message = f"<|channel|>commentary to=functions.f<|message|>{OSLO}"
    assert joined(Dialects("harmony", "harmony").reader(None).push(message)) == [Content(message)]


# ── which dialects a model speaks ─────────────────────────────────────────────────────────────────────────

HISTORY = "{%- for call in message.tool_calls %}"
TEMPLATES: list[tuple[str, set[str], Dialects]] = [
    ("{{ messages[0].content }}", {"<think>", "<tool_call>"}, Dialects()),
    ("{# calls are <tool_call> with arguments, thoughts <think>…</think> #}{{ x }}", set(), Dialects()),
    (
        HISTORY + '<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments }}}',
        set(),
        Dialects("hermes"),
    ),
    (
        HISTORY
        + "<tool_call> {{ call | tojson }} {% if think %}<think>{% else %}<think></think>{% endif %} arguments",
        set(),
        Dialects("hermes", "think"),
    ),
    (
        "{{- 'as follows:\\n<tool_call>\\n' }}\n{%- if x -%}{{- '{' }}{{- '\"name\": ' }}{{ call.arguments }}",
        set(),
        Dialects("hermes"),
    ),
    ("{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }} arguments", set(), Dialects("hermes")),
    ('<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <object>}', set(), Dialects("hermes")),
    (
        HISTORY + "{{ '<tool_call>' + call['name'] + '\\n' + call['arguments'] | tojson + '\\n</tool_call>' }}",
        set(),
        Dialects(),
    ),
    ("<tool_calls><tool_call>{{ name }}<tool_sep>{{ arguments }}<think></think>", set(), Dialects(None, "think")),
    ("{#- <tool_call>{\"name\": #}{{ 'Write no <tool_call>, but arguments as text.' }}", set(), Dialects()),
    (
        '{{ \'No <tool_call> and no arguments in tags! Say {"name": function, "parameters": values}.\' }}',
        set(),
        Dialects("llama3_json"),
    ),
    (
        "{{ 'No <tool_call>{}</tool_call> with arguments: write [func_name1(param=value)]' }}",
        set(),
        Dialects("pythonic"),
    ),
    ("{{ 'No <tool_call>.' }}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", set(), Dialects("mistral_args")),
    (HISTORY + "{%- set content = content.split('</think>')[-1] %}", set(), Dialects(None, "deepseek_r1")),
    (
        "<tool_call>{{ name }}<arg_key>{{ k }}</arg_key>{{ arguments }}<think></think>",
        set(),
        Dialects(None, "think"),
    ),
    ("<tool_call>\n<function={{ name }}>\n<parameter={{ k }}>", set(), Dialects("qwen3_coder")),
    (
        "{% set t = '<seed:tool_call>' %}<function={{ f }}><parameter={{ p }}><seed:think>{{ r }}</seed:think>",
        set(),
        Dialects("seed", "seed"),
    ),
    ('answer as {"name": function name, "parameters": dictionary}', set(), Dialects("llama3_json")),
    ('answer as {\\"name\\": name, \\"parameters\\": values}', set(), Dialects("llama3_json")),
    ("{{ '<|python_tag|>' + call }}", set(), Dialects("llama3_json")),
    ("write [func_name1(param1=value1), func_name2(...)]", set(), Dialects("pythonic")),
    ('{{- "[TOOL_CALLS] [" }}{{ call | tojson }}', {"[ARGS]"}, Dialects("mistral")),
    ("{{ '[TOOL_CALLS]' + name }}", {"[ARGS]"}, Dialects("mistral_args")),
    ("[TOOL_CALLS]{{ name }}[ARGS]{{ a }} [THINK]{{ t }}[/THINK]", set(), Dialects("mistral_args", "mistral")),
    (
        "<｜tool▁calls▁begin｜>{{ t }}<｜tool▁sep｜>{{ n }}\n```json <think>\n{{ x.split('</think>') }}",
        set(),
        Dialects("deepseek_v3", "think"),
    ),
    (
        "<｜tool▁calls▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments }}<think></think>",
        set(),
        Dialects("deepseek_v31", "think"),
    ),
    ("<|tool_calls_section_begin|><think></think>", set(), Dialects("kimi_k2", "think")),
    ("<|start|>assistant<|channel|>final<|message|>", set(), Dialects("harmony", "harmony")),
    ("<|START_THINKING|>{{ plan }}<|END_THINKING|><|START_ACTION|>", set(), Dialects(None, "cohere")),
    ("begin with Here is my thought process: and then Here is my response:", set(), Dialects(None, "granite")),
]


@pytest.mark.parametrize(("template", "tokens", "dialects"), TEMPLATES)
def test_a_template_shows_the_dialects(template: str, tokens: set[str], dialects: Dialects) -> None:
    assert detect(template, tokens) == dialects


def test_the_built_in_model_and_one_without_a_template() -> None:
    assert Tokenizer.load(builtin.path()).dialects == Dialects("hermes", "think")
    assert detect(None, {"<think>", "</think>"}) == Dialects()


@pytest.mark.parametrize(
    ("found", "tools", "reasoning", "chosen"),
    [
        (("hermes", "think"), None, None, ("hermes", "think")),
        (("hermes", "think"), "none", None, (None, "think")),
        ((None, None), "mistral", "none", ("mistral", None)),
        (("hermes", "think"), "harmony", None, ("harmony", "harmony")),
        (("hermes", "think"), None, "harmony", ("harmony", "harmony")),
        (("hermes", "think"), "none", "harmony", (None, "harmony")),
        (("harmony", "harmony"), "hermes", None, ("hermes", None)),
        (("harmony", "harmony"), None, "none", (None, None)),
        (("harmony", "harmony"), "none", None, (None, "harmony")),
    ],
)
def test_a_manifest_has_the_last_word(
    found: tuple[str | None, str | None],
    tools: str | None,
    reasoning: str | None,
    chosen: tuple[str | None, str | None],
) -> None:
    assert Dialects(*found).overridden(tools, reasoning) == Dialects(*chosen)


def test_manifests_know_the_dialects_by_their_names() -> None:
    assert set(get_args(ToolDialect)) == {NONE, *DIALECTS}
    assert set(get_args(ReasoningDialect)) == {NONE, *REASONING}


@pytest.mark.parametrize(
    ("prompt", "continued", "opened"),
    [
        ("<|im_start|>assistant\n", None, False),
        ("<|im_start|>assistant\n<think>\n", None, True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, False),
        ("user: <think>\nassistant:", None, False),
        ("…<think>\nso far", "<think>\nso far", True),
        ("…<think>a</think>b", "<think>a</think>b", False),
    ],
)
def test_whether_a_prompt_ends_inside_a_thought(prompt: str, continued: str | None, opened: bool) -> None:
    assert Dialects("hermes", "think").opens_thought(prompt, continued) == opened
    assert not Dialects("hermes").opens_thought(prompt, continued)


def test_text_that_is_continued_is_a_thought_by_its_mark_alone() -> None:
    dialects = Dialects(None, "deepseek_r1")
    assert not dialects.opens_thought("…The answer is (", "The answer is (")
    assert not dialects.opens_thought("…so</think>It is", "so</think>It is")
    assert dialects.opens_thought("…<think>so", "<think>so")


def test_what_no_text_can_be_held_to_is_refused_by_name() -> None:
    tool = Tool("f", {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x"}}}, strict=True)
    with pytest.raises(ParamRefused, match=r"qwen3_coder.*strict tool 'f'.*'pattern' in its string 'a'"):
        DIALECTS["qwen3_coder"].calls([tool], parallel=True)
    DIALECTS["hermes"].calls([tool], parallel=True)


# ── what schemas say of values ────────────────────────────────────────────────────────────────────────────


class Watched(dict[str, Any]):
    """A schema that counts how often it is looked at, and complains when that is too often."""

    looks = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.looks += 1
        assert self.looks < 10_000, "it is gone through again and again"
        return super().get(key, default)


@pytest.mark.parametrize("name", ["qwen3_coder", "seed", "pythonic"])
def test_a_schema_that_leads_back_to_itself_is_gone_through_once(name: str) -> None:
    again = Watched(anyOf=[{"$ref": "#/$defs/again"}] * 30)
    tool = Tool("f", {"properties": {"a": {"$ref": "#/$defs/again"}}, "$defs": {"again": again}}, strict=True)
    for forms in (DIALECTS[name].guided, lambda tools: DIALECTS[name].calls(tools, parallel=True)):
        with suppress(ParamRefused):  # there is no text for some of it
            forms([tool])
    reader = Dialects(name).reader([tool])
    reader.push("<function=f>" + "<parameter=a>1</parameter>" * 3 + "</function>")
    reader.finish()


def tagged(schema: dict[str, Any], written: str) -> str:
    """The arguments of a call whose one parameter is written so."""
    reader = Dialects("qwen3_coder").reader([Tool("f", {"properties": {"a": schema}})])
    parts = joined(reader.push(f"<function=f><parameter=a>{written}</parameter></function>") + reader.finish())
    assert isinstance(parts[1], CallArguments)
    return parts[1].text


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        ("integer", "12", "12"),
        ("integer", "-1.0", "-1.0"),
        ("integer", "1.5", '"1.5"'),
        ("integer", "1e2", '"1e2"'),
        ("integer", "1٢", '"1٢"'),
        ("number", "-1.5e3", "-1.5e3"),
        ("number", "1E+٢", '"1E+٢"'),
        ("number", "1.٢", '"1.٢"'),
        ("number", "01", '"01"'),
        ("object", "{'a': '\\d'}", r'{"a": "\\d"}'),
        ("array", r'["\ud83d\ude00", "\ud83d"]', r'["\ud83d\ude00", "\ud83d"]'),
    ],
)
def test_a_value_that_is_not_of_its_type_stays_a_string(kind: str, written: str, value: str) -> None:
    assert tagged({"type": kind}, written) == f'{{"a": {value}}}'
    json.loads(value)


@pytest.mark.parametrize(
    ("ref", "value"),
    [("#/properties/b", "2"), ("#/$defs/of/anyOf/0", "2"), ("#/$defs/a%20b", "2"), ("#/$defs/none", '"2"')],
)
def test_a_reference_is_followed_to_wherever_it_leads(ref: str, value: str) -> None:
    number = {"type": "integer"}
    defined = {"a b": number, "of": {"anyOf": [number]}}
    tool = Tool("f", {"properties": {"a": {"$ref": ref}, "b": number}, "$defs": defined})
    reader = Dialects("qwen3_coder").reader([tool])
    parts = joined(reader.push("<function=f><parameter=a>2</parameter></function>") + reader.finish())
    assert parts[1] == CallArguments(0, f'{{"a": {value}}}')


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (r"'\d+'", r'"\\d+"'),
        (r"'\ud83d\ude00 \ud83d.'", '"🦊 \ufffd."'.replace("🦊", "😀")),
        (
            r"{'a': [1_000, 0x1F, .5, 1.], 1: (2,), 'c': (3), True: ()}",
            '{"a": [1000, 31, 0.5, 1.0], "1": [2], "c": 3, "true": []}',
        ),
        ("'a' \"b\" '''c\n'd''' r'\\e'", '"abc\\n\'d\\\\e"'),
        (r"'\x41\101\u00e9\N{BULLET}\U0001f98a\/'", '"AAé•🦊\\\\/"'),
        ("[true, None, false]", "[true, null, false]"),
        ('{"x": \'y\', "z": null,}', '{"x": "y", "z": null}'),
        ("1e3", "1e3"),
        ("+1", "1"),
    ],
)
def test_a_literal_of_python_becomes_json(written: str, value: str) -> None:
    assert python_or_json(written) == value
    json.loads(value)


@pytest.mark.parametrize(
    "written",
    [
        "", "f(1)", "[1", "1]", "'a", "[,]", "[1 2]", "{1}", "{'a'}", "{'a': }", "1+2j", "nan", "NaN", "1_0e999",
        "007", "1٢", "_1", "a", "-", "'a\nb'", r"'\x4'", r"'\N{no such sign}'", r"'\U00110000'", "{(1,): 2}",
        "b'x'", "f'x'", "True1", "'a'1", "1'a'", "..", "...", "[" * 500 + "]" * 500 + ",",
        "[" + "'a', " * 20_000 + "]",
    ],
)  # fmt: skip
def test_what_is_no_literal_stays_what_was_written(written: str) -> None:
    assert python_or_json(written) is None


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_LITERALS = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@settings(max_examples=examples(40), deadline=None)
@given(value=_LITERALS)
def test_whatever_python_writes_is_read(value: object) -> None:
    found = python_or_json(repr(value))
    assert found is not None
    assert json.loads(found) == json.loads(json.dumps(value))


def test_long_literals_take_no_long_time() -> None:
    began = time.process_time()
    size = BIG // 4
    for text in ("'" + "\\" * size, "'" + "a\\d" * size + "'", "'" * size, "'''a" * size, "[(" * size):
        python_or_json(text)
    assert time.process_time() - began < bound(2)


# ── how much a form takes ─────────────────────────────────────────────────────────────────────────────────

ONE_BY_ONE = ["qwen3_coder", "seed", "pythonic"]


def form_of(name: str, *tools: Tool) -> int:
    """Bytes of the form of a forced call."""
    held = Markup(Dialects(name), tools, frozenset(), must_call=True).held_to(None)
    assert held is not None
    return len(held.text.encode())


def optional(count: int, schema: dict[str, Any] | None = None, defined: int = 0) -> Tool:
    """A tool with arguments that may all be left out, and definitions of some size."""
    given = {f"argument_{at}": schema or {"type": "string", "description": "d" * 30} for at in range(count)}
    parameters: dict[str, Any] = {"type": "object", "properties": given}
    return Tool(
        "f", {**parameters, "$defs": {"x": {"enum": [0], "title": "t" * defined}}} if defined else parameters
    )


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_form_grows_as_its_schemas_do(name: str) -> None:
    some, more = form_of(name, optional(40)), form_of(name, optional(160))
    assert more < 5 * some
    refers = {"$ref": "#/$defs/x"}
    bare, defined = form_of(name, optional(40, refers, 1)), form_of(name, optional(40, refers, 4_000))
    assert defined < bare + 5_000, "definitions stand there once"


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_ordinary_tools_fit(name: str) -> None:
    refers = {"$ref": "#/$defs/x"}
    for tools in ([optional(15)] * 5, [optional(15, refers, 1_000)], [optional(100, refers, 4_000)]):
        assert form_of(name, *tools) <= MAX_STRUCTURED // 2


@pytest.mark.parametrize("name", [*ONE_BY_ONE, "hermes"])
def test_a_form_that_is_too_large_is_refused_by_the_field(name: str) -> None:
    large = optional(2_000)
    with pytest.raises(ParamRefused, match=rf"'tools' .* of at most {MAX_STRUCTURED}") as refused:
        form_of(name, large)
    assert refused.value.param == "tools"
    wanted = Structured("regex", "a{2}")
    with pytest.raises(ParamRefused, match="'response_format' with 1 tools") as refused:
        Markup(Dialects(name), (large,), frozenset()).held_to(wanted, field="response_format")
    assert refused.value.param == "response_format"
