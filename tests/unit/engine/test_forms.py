"""Forms: what a text is held to by its parts, with thoughts before it, and the calls that dialects describe by
them.

What a dialect calls a call its grammar allows, and whatever that grammar lets a model write, the dialect reads as
calls. No model is run here.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.effort import times
from tests.unit.platform.dialect_cases import CASES, MANY, NOTHING, OSLO, WEATHER, Case

from quire import builtin
from quire.text import ParamRefused
from quire.text.dialects import TOOLS, CallArguments, CallBegins, Content, Dialects, Part, Tool, joined
from quire.text.markup import Markup
from quire_engine.errors import RequestRefused
from quire_engine.grammar import Grammar, Grammars, source
from quire_engine.vocabulary import Vocabulary
from quire_schemas.wire import Structured

SIZE, EOS = 2048, (2041, 2039)
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")


class Held:
    """A vocabulary and the grammars of its model."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = Vocabulary.read(folder, SIZE, EOS)
        self.grammars = Grammars(folder, SIZE, EOS)
        tokens = self.vocabulary.tokens
        self.closing = {index for index, token in enumerate(tokens) if set(token) <= set(b'"}])<>/|\n')}
        self.closing |= set(self.vocabulary.special.values()) - set(EOS)
        self.byte_of = {token[0]: index for index, token in enumerate(tokens) if len(token) == 1}

    def ids(self, text: str) -> list[int]:
        """The text in bytes, and in tokens where it has special ones."""
        for name, index in self.vocabulary.special.items():
            if name in text:
                before, _, after = text.partition(name)
                return [*self.ids(before), index, *self.ids(after)]
        return [self.byte_of[byte] for byte in text.encode()]

    def takes(self, structured: Structured, text: str) -> bool:
        """Whether the whole of `text` fits."""
        matcher, output = self.grammars.compile(structured).matcher(EOS), list[int]()
        for token in self.ids(text):
            if not _has(matcher.allowed(output), token):
                return False
            output.append(token)
        return _has(matcher.allowed(output), EOS[0])

    def walk(self, grammar: Grammar, chance: random.Random, most: int = 200) -> str | None:
        """A text by random choice among what is allowed; None if it came to no end."""
        matcher, output = grammar.matcher(EOS), list[int]()
        tokens = self.vocabulary.tokens
        while len(output) < most:
            bits = matcher.allowed(output)
            if _has(bits, EOS[0]) and chance.random() < 0.5:
                return b"".join(tokens[index] for index in output).decode(errors="replace")
            able = [index for index in range(SIZE) if _has(bits, index) and index not in EOS]
            if not able:
                return b"".join(tokens[index] for index in output).decode(errors="replace")
            closing = [index for index in able if index in self.closing]
            output.append(chance.choice(closing if closing and chance.random() < 0.8 else able))
        return None


def _has(bits: bytes, index: int) -> bool:
    return bool(bits[index // 8] >> index % 8 & 1)


@pytest.fixture(scope="module")
def tiny() -> Held:
    return Held(builtin.path())


@pytest.fixture(scope="module")
def with_special(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """The same vocabulary, with the marks of Harmony as special tokens."""
    folder = tmp_path_factory.mktemp("special")
    described = json.loads((builtin.path() / "tokenizer.json").read_text())
    for added, name in zip(described["added_tokens"][3:], HARMONY_TOKENS, strict=False):
        added.update(content=name, special=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return Held(folder)


def after_thought(dialects: Dialects, wanted: Structured, *, opened: bool = False) -> Structured:
    """The constraint of an answer whose content is to be `wanted`."""
    held = Markup(dialects, (), frozenset(), opened, thinks=True).held_to(wanted)
    assert held is not None
    return held


def forced(dialects: Dialects, tools: Sequence[Tool], *, parallel: bool, opened: bool = False) -> Structured:
    """The constraint of an answer that has to be calls."""
    markup = Markup(
        dialects, tuple(tools), frozenset(), opened, thinks=True, must_call=True, one_call=not parallel
    )
    held = markup.held_to(None)
    assert held is not None
    return held


def guided(dialects: Dialects, tools: Sequence[Tool], *, opened: bool = False) -> Structured:
    """The constraint of an answer that may be anything, while one of the tools is strict."""
    held = Markup(dialects, tuple(tools), frozenset(), opened).held_to(None)
    assert held is not None
    return held


def form(value: dict[str, Any]) -> Structured:
    return Structured("form", json.dumps(value), "")


# ── forms by themselves ───────────────────────────────────────────────────────────────────────────────────

A, B = {"text": "a"}, {"text": "b"}


@pytest.mark.parametrize(
    ("value", "fitting", "others"),
    [
        ({"text": 'a"\n'}, ['a"\n'], ["a", ""]),
        ({"text": ""}, [""], ["a"]),
        ({"through": "</x>"}, ["</x>", "a</x</x>", "\n</x>"], ["a", "</x>b", "</x></x>"]),
        ({"sequence": [{"through": "."}, {"regex": "[0-9]+"}]}, ["a.1", ".22"], ["a.", "1", "a.b.1"]),
        ({"sequence": []}, [""], ["a"]),
        ({"any": [A, {"sequence": [A, B]}]}, ["a", "ab"], ["b", "aa"]),
        ({"sequence": [{"any": [A, B]}, {"any": [A, B]}]}, ["ab", "aa"], ["a", "aba"]),
        ({"repeat": A}, ["", "a", "aaa"], ["b", "ab"]),
        ({"repeat": A, "least": 1, "between": B}, ["a", "aba"], ["", "ab", "aa"]),
        ({"repeat": A, "least": 2, "most": 3, "between": B}, ["aba", "ababa"], ["a", "abababa"]),
        ({"repeat": {"any": [A, B]}, "most": 1}, ["", "a", "b"], ["ab"]),
        (
            {"some": [A, B, {"text": "c"}], "between": {"text": ","}},
            ["", "a", "a,b,c", "a,c", "c"],
            ["b,a", "a,", "ac"],
        ),
        ({"some": [], "between": A}, [""], ["a"]),
        ({"schema": {"enum": ["x"]}}, ['"x"'], ["x"]),
        ({"schema": {"type": "object", "not": {}}, "lenient": True}, ["{}", '{"a":1}'], ["1"]),
        ({"structured": {"kind": "choice", "text": '["a", "bc"]'}}, ["a", "bc"], ["b", "abc"]),
        ({"structured": {"kind": "json_schema", "text": '{"const": 1}'}}, ["1"], ["2"]),
        ({"structured": {"kind": "grammar", "text": "start: r0 r0\nr0: /[xy]/"}}, ["xy"], ["x", "xyx"]),
        (
            {"free": [{"mark": "<f>", "then": {"text": "1"}}, {"mark": "<g>", "then": B}]},
            ["", "a", "x<f>1y", "<g>b<f>1"],
            ["<f>", "<f>2", "x<g>1"],
        ),
        (
            {
                "free": [{"mark": "<f>", "then": {"text": "1"}}],
                "begins": [{"mark": "{", "then": B}, {"mark": "<t>", "then": {"through": "</t>"}, "again": True}],
            },
            ["", " ", "a{", "<f>1{", " {b", "<t></t>", "<t><f>2</t>a", "<t>{</t> {b", "\n<t></t>x<f>1<t>"],
            ["{", "{a", "{ba", "<t>", "<t><f>1", "<t></t>{a", "<t></t>{ba", "<t></t><f>2", "\n<t>"],
        ),
    ],
)
def test_a_form_is_what_it_says(tiny: Held, value: dict[str, Any], fitting: list[str], others: list[str]) -> None:
    for text in fitting:
        assert tiny.takes(form(value), text), text
    for text in others:
        assert not tiny.takes(form(value), text), text


FAMILY = {
    "$id": "tree",
    "properties": {"a": {"enum": [1]}, "b": {"$ref": "#/properties/a"}, "c": {"$ref": "#/$defs/list"}},
    "$defs": {
        "list": {"anyOf": [{"$ref": "tree#/$defs/pair"}, {"type": "null"}]},
        "pair": {
            "type": "array",
            "prefixItems": [{"$ref": "#one"}],
            "items": {"$ref": "#/$defs/list"},
            "maxItems": 2,
        },
        "one": {"$anchor": "one", "const": 2},
        "text": {"const": {"$ref": "#/properties/a"}},
        "never": False,
        "odd": {"type": "string", "uniqueItems": True},
    },
}


def rooted(*schemas: Any, lenient: bool = False) -> Structured:
    """One schema after the other, all of one family."""
    forms = [{"schema": schema, "lenient": lenient} for schema in schemas]
    return form({"root": FAMILY, "form": {"sequence": forms}})


def test_references_in_schemas_are_into_their_root(tiny: Held) -> None:
    for place, fitting, others in (
        ("#/properties/b", ["1"], ["2", "null"]),
        ("#/properties/c", ["null", "[2]", "[2,[2,null]]"], ["[1]", "[2,1]", "[2,[1]]"]),
        ("#/$defs/list/anyOf/1", ["null"], ["[2]"]),
        ("#/$defs/text", ['{"$ref":"#/properties/a"}'], ["1"]),
    ):
        schema = {"anyOf": [{"$ref": place}, {"const": "x"}]}
        for text in (*fitting, '"x"'):
            assert tiny.takes(rooted(schema), text), (place, text)
        for text in others:
            assert not tiny.takes(rooted(schema), text), (place, text)
    # properties of the part are not those of the root, nor are definitions that it happens to have
    inner = {
        "type": "object",
        "properties": {"a": {"$ref": "#/properties/a"}},
        "required": ["a"],
        "$defs": {"d0": 1},
    }
    held = rooted({**inner, "additionalProperties": False}, {"$ref": "#/properties/a"})
    assert tiny.takes(held, '{"a":1}1')
    assert not tiny.takes(held, '{"a":{"a":1}}1')


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("#/$defs/none", "not there"),
        ("#/$defs/d0", "not there"),
        ("#none", "not there"),
        ("#/$defs/text/const", "no schema"),
        ("other#/$defs/one", "another document"),
        ("#/$defs/odd", "uniqueItems"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_by_name(tiny: Held, reference: str, why: str) -> None:
    schema = {"type": "string", "$ref": reference}
    with pytest.raises(RequestRefused, match=why):
        tiny.grammars.compile(rooted(schema))
    held = rooted(schema, {"$ref": "#/properties/a"}, lenient=True)
    assert tiny.takes(held, '"x"1'), "the one is of its type, the other holds"
    assert not tiny.takes(held, '"x"2')
    assert not tiny.takes(held, "11")


def test_a_root_is_of_the_forms_in_it_alone(tiny: Held) -> None:
    own = {"structured": {"kind": "json_schema", "text": '{"$ref":"#/$defs/a","$defs":{"a":{"const":3}}}'}}
    inner = {"root": {"$defs": {"one": {"const": 4}}}, "form": {"schema": {"$ref": "#/$defs/one"}}}
    one = {"schema": {"$ref": "#/$defs/one"}}
    held = form(
        {"sequence": [{"root": FAMILY, "form": {"sequence": [one, inner, own, one]}}, {"schema": {"const": 5}}]}
    )
    assert tiny.takes(held, "24325")


def test_schemas_that_refer_to_much_are_written_once_and_not_without_end(tiny: Held) -> None:
    much = {"enum": [f"{at:04}" for at in range(4_000)]}
    root = {"$defs": {"much": much}}
    refers = {"schema": {"$ref": "#/$defs/much"}}
    written = source(form({"root": root, "form": {"sequence": [refers] * 200}}), {})
    assert len(written) < 2 * len(json.dumps(much))
    others = [
        {"schema": {"anyOf": [{"$ref": "#/$defs/much"}, {"const": at}]}, "lenient": True} for at in range(200)
    ]
    with pytest.raises(RequestRefused, match="more than 1 MiB"):
        source(form({"root": root, "form": {"sequence": others}}), {})


def test_many_arguments_that_may_be_left_out_compile(tiny: Held) -> None:
    schema = {"type": "object", "properties": {f"a{at}": {"type": "integer"} for at in range(400)}}
    held = forced(Dialects("pythonic"), [Tool("f", schema)], parallel=False)
    for text in ("", "a0=1", "a399=1", "a0=1, a399=2", ", ".join(f"a{at}={at}" for at in range(0, 400, 7))):
        assert tiny.takes(held, f"[f({text})]"), text
    for text in ("a1=1, a0=1", "a1=1, a1=1", "a0=1,", "a0='x'", "b=1"):
        assert not tiny.takes(held, f"[f({text})]"), text


def test_special_tokens_are_tokens_and_no_text(with_special: Held) -> None:
    marked = form({"sequence": [{"through": "<|end|>"}, {"text": "<|start|>a<|channel|>"}]})
    assert with_special.takes(marked, "so<|end|><|start|>a<|channel|>")
    spelled = [with_special.byte_of[byte] for byte in b"so<|end|>"]
    matcher = with_special.grammars.compile(marked).matcher(EOS)
    allowed = matcher.allowed(spelled)
    assert not _has(allowed, with_special.vocabulary.special["<|start|>"]), "letters that look like the mark"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"any": 1}',
        '{"root": 1, "form": {"text": ""}}',
        '{"some": [{}], "between": {"text": ""}}',
        '{"text": 1}',
        '{"repeat": {}}',
        '{"structured": {"kind": "x", "text": ""}}',
    ],
)
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(RequestRefused, match=r"no form|no JSON object"):
        source(Structured("form", text), {})


def test_deep_forms_and_schemas_that_cannot_be_held_to_are_refused(tiny: Held) -> None:
    deep = '{"sequence":[' * 2000 + '{"text":"a"}' + "]}" * 2000
    with pytest.raises(RequestRefused):
        source(Structured("form", deep), {})
    with pytest.raises(RequestRefused, match="not"):
        tiny.takes(form({"schema": {"type": "object", "not": {}}}), "{}")
    with pytest.raises(RequestRefused, match="special token and more"):
        tiny.takes(form({"through": "a<|im_end|>"}), "")


# ── what follows a thought ────────────────────────────────────────────────────────────────────────────────

OBJECT = Structured(
    "json_schema", '{"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":false}'
)


@pytest.mark.parametrize("inner", [OBJECT, Structured("regex", r"\{\}"), Structured("grammar", 'start: "{" "}"')])
def test_a_constraint_waits_for_the_end_of_the_thought(tiny: Held, inner: Structured) -> None:
    dialects = Dialects(None, "think")
    held = after_thought(dialects, inner, opened=True)
    assert tiny.takes(held, "I think </thin </think>\n\n{}")
    assert tiny.takes(held, "</think>{}")
    assert not tiny.takes(held, "{}"), "the thought is open"
    assert not tiny.takes(held, "a</think>{}b")
    either = after_thought(dialects, inner)
    assert tiny.takes(either, "<think>\na</think>\n{}")
    assert tiny.takes(either, "{}")
    assert not tiny.takes(either, "<think>a")
    assert not tiny.takes(either, "a")
    assert not tiny.takes(after_thought(Dialects(), inner), "<think>a</think>{}")


TAG = {"triggers": ["<f>"], "structures": [{"begin": "<f>", "schema": {"const": [1]}, "end": "</f>"}]}


@pytest.mark.parametrize("spaces", [None, ""])
def test_free_text_with_structures_may_follow_a_thought_that_has_none(tiny: Held, spaces: str | None) -> None:
    held = after_thought(Dialects(None, "think"), Structured("structural_tag", json.dumps(TAG), spaces))
    for text in ("a<f>[1]</f>b", "<think>or <f>2?</think>\n a<f>[1]</f>", ""):
        assert tiny.takes(held, text), text
    for text in ("a<f>2", "<think>a</think><f>2", "<think>"):
        assert not tiny.takes(held, text), text
    assert tiny.takes(held, "<f>[ 1]</f>") == (spaces is None)


def test_the_answer_of_harmony_has_a_header(with_special: Held) -> None:
    held = after_thought(Dialects("harmony", "harmony"), OBJECT)
    head = "<|channel|>final<|message|>"
    assert with_special.takes(held, head + '{"a":1}')
    assert with_special.takes(held, f'<|channel|>analysis<|message|>hm<|end|><|start|>assistant{head}{{"a":1}}')
    assert not with_special.takes(held, "{}")
    assert not with_special.takes(held, head + "a")


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [case for case in CASES if case.forced], ids=lambda case: case.name)
def test_a_dialects_grammar_allows_what_it_reads_as_a_call(tiny: Held, with_special: Held, case: Case) -> None:
    for held in (tiny, with_special) if case.dialects.tools == "harmony" else (tiny,):
        for parallel in (False, True):
            must = forced(case.dialects, [WEATHER, NOTHING], parallel=parallel, opened=case.opened)
            assert held.takes(must, case.text)
            assert not held.takes(must, case.text.replace("Oslo", "too long a name"))
            assert not held.takes(must, "Hello.")
        free = guided(case.dialects, [WEATHER, NOTHING], opened=case.opened)
        assert held.takes(free, case.text)


def test_every_dialect_has_a_call_that_its_grammar_allows() -> None:
    assert {case.dialects.tools for case in CASES if case.forced} == set(TOOLS)


def read(dialects: Dialects, text: str, tools: tuple[Tool, ...], opened: bool) -> list[Part]:
    reader = dialects.reader(tools, opened=opened)
    return joined(reader.push(text) + reader.finish())


def called(parts: list[Part]) -> list[tuple[str, Any]]:
    """Calls by name, with their arguments read."""
    names = {part.index: part.name for part in parts if isinstance(part, CallBegins)}
    texts = {part.index: part.text for part in parts if isinstance(part, CallArguments)}
    return [(name, json.loads(texts[index])) for index, name in names.items()]


@pytest.mark.parametrize("name", TOOLS)
def test_what_a_forced_grammar_lets_a_model_write_is_calls(tiny: Held, with_special: Held, name: str) -> None:
    chance = random.Random(name)
    reasoning = "harmony" if name == "harmony" else None
    dialects = Dialects(name, reasoning)
    tools = (WEATHER, NOTHING)
    by_name = {tool.name: tool for tool in tools}
    ended = 0
    for number in range(times(12, 300)):
        opened = reasoning is not None and number % 2 == 1
        held = with_special if name == "harmony" else tiny
        text = held.walk(held.grammars.compile(forced(dialects, tools, parallel=True, opened=opened)), chance)
        if text is None:
            continue
        ended += 1
        parts = read(dialects, text, tools, opened)
        made = called(parts)
        assert made, text
        assert not [part for part in parts if isinstance(part, Content)], text
        for tool, arguments in made:
            jsonschema.validate(arguments, dict(by_name[tool].parameters))
    assert ended >= times(4, 60)


TWICE = {
    "hermes": 2 * ['<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'],
    "llama3_json": 2 * ['{"name": "get_time", "parameters": {}}'],
    "mistral": ['[TOOL_CALLS][{"name": "get_time", "arguments": {}}', '{"name": "get_time", "arguments": {}}]'],
    "mistral_args": 2 * ["[TOOL_CALLS]get_time[ARGS]{}"],
    "qwen3_coder": 2 * ["<tool_call>\n<function=get_time>\n</function>\n</tool_call>"],
    "pythonic": ["[get_time()", "get_time()]"],
}


@pytest.mark.parametrize("name", TWICE)
def test_several_calls_are_allowed_where_they_may_be(tiny: Held, name: str) -> None:
    separator = {"hermes": "\n", "llama3_json": "; ", "mistral_args": "", "qwen3_coder": "\n"}.get(name, ", ")
    text = separator.join(TWICE[name])
    assert tiny.takes(forced(Dialects(name), [NOTHING], parallel=True), text)
    assert not tiny.takes(forced(Dialects(name), [NOTHING], parallel=False), text)
    assert called(read(Dialects(name), text, (NOTHING,), False)) == [("get_time", {})] * 2


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_of_any_schema_can_be_forced(tiny: Held, name: str) -> None:
    """Also where the schema has what cannot be held to, unless the tool is strict."""
    dialects = Dialects(name, "harmony" if name == "harmony" else None)
    odd = Tool("odd", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})
    tiny.grammars.compile(forced(dialects, [MANY, odd], parallel=True))
    strict = Tool("odd", odd.parameters, strict=True)
    with pytest.raises(RequestRefused, match="uniqueItems"):
        tiny.grammars.compile(forced(dialects, [strict], parallel=True))


def _with_days(text: str, days: str) -> str:
    return text.replace(OSLO, f'{{"city": "Oslo", "days": {days}}}')


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_args", "deepseek_v3", "deepseek_v31", "kimi_k2"])
def test_text_is_free_until_a_call_begins_and_a_strict_one_fits(tiny: Held, name: str) -> None:
    case = next(case for case in CASES if case.forced and case.dialects == Dialects(name))
    free = guided(Dialects(name), [WEATHER, NOTHING])
    for before in ("", "Let me see. < [ {\n"):
        assert tiny.takes(free, before)
        assert tiny.takes(free, before + case.text)
        assert tiny.takes(free, before + _with_days(case.text, "1"))
        assert not tiny.takes(free, before + _with_days(case.text, '"1"')), "no integer"
        assert not tiny.takes(free, before + case.text.replace("get_weather", "get_whether")), "no such tool"
    loose = guided(Dialects(name), [Tool(WEATHER.name, WEATHER.parameters), Tool("x", {}, strict=True)])
    assert tiny.takes(loose, _with_days(case.text, '"1"')), "nobody asked for that"


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("llama3_json", '{"name": "get_weather", "parameters": {"days": 1}}'),
        ("pythonic", '[get_weather(city="Oslo", days="1")]'),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=days>\n1\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_where_nothing_announces_a_call_the_first_sign_does(tiny: Held, name: str, bad: str) -> None:
    free = guided(Dialects(name), [WEATHER, NOTHING])
    for text in ("", "Hello {there} [1] <x>", " \n Hello", " "):
        assert tiny.takes(free, text), text
    assert not tiny.takes(free, bad)


def test_a_guided_answer_of_harmony_is_messages(with_special: Held) -> None:
    free = guided(Dialects("harmony"), [WEATHER, NOTHING])
    to = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    aside = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for text in ("<|channel|>final<|message|>Hello.", f"{to}{OSLO}", f"{aside}{to}{OSLO}"):
        assert with_special.takes(free, text), text
    for text in ("Hello", f'{aside}{to}{{"days": 1}}', f"{aside}{to.replace('weather', 'x')}{OSLO}"):
        assert not with_special.takes(free, text), text


# ── names and schemas that dialects cannot write, or can just about ───────────────────────────────────────

FUNCTIONS = ["a-b", "a.b.c", "1st", "größe", "名前", "two words", "a<b", "f:3", "functions.f", "q(x)"]
KEYS = [
    "a-b",
    "a.b",
    "1st",
    "größe",
    "gro\u0308ße",
    "名",
    "first name",
    " x ",
    "x:y",
    "a=b",
    "$id",
    'a"b',
    "a,b",
    "",
]
KEYS += ["a>b", "a<b", "a\nb", "</parameter", "name", "arguments"]
_NO_TAG = {"a>b", "a<b", "a\nb", "</parameter"}
_UNSPELLED: dict[str, tuple[set[str], set[str]]] = {
    "mistral_args": ({"größe", "名前", "two words", "a<b", "q(x)"}, set()),
    "qwen3_coder": ({"two words", "a<b"}, _NO_TAG),
    "seed": ({"two words", "a<b"}, _NO_TAG),
    "pythonic": (
        {"two words", "a<b", "f:3", "q(x)"},
        _NO_TAG | {"first name", " x ", "x:y", "a=b", "$id", 'a"b', "", "a,b"},
    ),
    "deepseek_v3": ({"a<b"}, set()),
    "deepseek_v31": ({"a<b"}, set()),
    "kimi_k2": ({"a<b"}, set()),
    "harmony": ({"two words", "a<b"}, set()),
}
"""Functions and arguments that a dialect cannot spell."""


def spoken(name: str) -> Dialects:
    return Dialects(name, "harmony" if name == "harmony" else None)


def refused(name: str, tool: Tool) -> str | None:
    try:
        forced(spoken(name), [tool], parallel=True)
    except ParamRefused as error:
        return f"{error.param}: {error.message}"
    return None


def one_call(held: Held, dialects: Dialects, tool: Tool, chance: random.Random) -> tuple[str, Any] | None:
    """What a forced call of the tool is read as; None if it came to no end."""
    text = held.walk(held.grammars.compile(forced(dialects, [tool], parallel=False)), chance, most=900)
    if text is None:
        return None
    parts = read(dialects, text, (tool,), False)
    assert not [part for part in parts if isinstance(part, Content)], text
    (call,) = called(parts)
    assert call[0] == tool.name, text
    jsonschema.validate(call[1], dict(tool.parameters))
    return call


@pytest.mark.parametrize("name", TOOLS)
def test_a_call_of_any_name_is_read_again_or_refused_by_name(tiny: Held, with_special: Held, name: str) -> None:
    chance, held = random.Random(name), with_special if name == "harmony" else tiny
    no_functions, no_keys = _UNSPELLED.get(name, (set(), set()))
    for function in FUNCTIONS:
        said = refused(name, Tool(function, {}))
        assert (said is not None) == (function in no_functions), (function, said)
        assert said is None or (f"'{function}'" in said and said.startswith("tools: ") and name in said)
        if said is None:
            assert one_call(held, spoken(name), Tool(function, {}), chance) == (function, {})
    values = ({"enum": [1, 2]}, {"type": "string", "maxLength": 3}, {"type": "boolean"})
    able: dict[str, Any] = {}
    for key, schema in zip(KEYS, itertools.cycle(values), strict=False):
        said = refused(name, Tool("f", {"type": "object", "properties": {key: schema}}))
        assert (said is not None) == (key in no_keys), (key, said)
        assert said is None or f"'{key}'" in said
        if said is None:
            able[key] = schema
    every = {"type": "object", "properties": able, "required": list(able), "additionalProperties": False}
    ended = [one_call(held, spoken(name), Tool("f", every), chance) for _ in range(times(3, 40))]
    assert any(ended)


AT_A_REF = {
    "$ref": "#/$defs/Args",
    "$defs": {
        "Args": {
            "type": "object",
            "properties": {"days": {"$ref": "#/$defs/Days"}, "on": {"type": "boolean"}},
            "required": ["days"],
            "additionalProperties": False,
        },
        "Days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
}
ANY_NUMBERS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}}
SOME_NUMBERS = {**ANY_NUMBERS, "required": ["days", "weeks"]}
ANYTHING = {"type": "object"}


@pytest.mark.parametrize("name", TOOLS)
def test_an_object_is_written_as_its_schema_says_it(tiny: Held, with_special: Held, name: str) -> None:
    chance, held = random.Random(name), with_special if name == "harmony" else tiny
    schemas: list[dict[str, Any]] = [AT_A_REF, ANY_NUMBERS, SOME_NUMBERS, ANYTHING]
    for number, schema in enumerate(schemas):
        tool = Tool("f", schema, strict=number % 2 == 0)
        made = [one_call(held, spoken(name), tool, chance) for _ in range(times(2, 40))]
        assert any(made), schema


@pytest.mark.parametrize("strict", [False, True])
def test_members_that_no_schema_names_may_be_written_and_fit(tiny: Held, strict: bool) -> None:
    tool = Tool("f", ANY_NUMBERS, strict)
    coder = "<tool_call>\n<function=f>\n<parameter=größe>\n{}\n</parameter>\n</function>\n</tool_call>"
    for name, text in (("qwen3_coder", coder), ("pythonic", "[f(größe={})]")):
        held = forced(Dialects(name), [tool], parallel=False)
        assert tiny.takes(held, text.format(3))
        assert not tiny.takes(held, text.format('"x"'))
        assert called(read(Dialects(name), text.format(3), (tool,), False)) == [("f", {"größe": 3})]


SIBLINGS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"$ref": "#/properties/a"}},
    "required": ["b"],
    "additionalProperties": False,
}


def test_an_argument_may_be_what_its_neighbour_is(tiny: Held) -> None:
    coder = "<tool_call>\n<function=f>\n<parameter=b>\n{}\n</parameter>\n</function>\n</tool_call>"
    for strict in (False, True):
        tool = Tool("f", SIBLINGS, strict)
        for name, text in (("qwen3_coder", coder), ("pythonic", "[f(b={})]")):
            held = forced(Dialects(name), [tool], parallel=False)
            assert tiny.takes(held, text.format(3))
            assert not tiny.takes(held, text.format('"x"')), "no integer"
            assert called(read(Dialects(name), text.format(3), (tool,), False)) == [("f", {"b": 3})]


BRANCHES: dict[str, Any] = {"anyOf": [{"type": "object", "properties": {"a": {}}, "required": ["a"]}]}


@pytest.mark.parametrize("name", ["qwen3_coder", "seed", "pythonic"])
def test_what_cannot_be_written_member_by_member_is_refused(name: str) -> None:
    strict = {"type": "object", "properties": {"a": {}}, "minProperties": 1}
    assert refused(name, Tool("f", strict)) is None
    for schema, tool in (("minProperties", Tool("f", strict, strict=True)), ("anyOf", Tool("f", BRANCHES))):
        said = refused(name, tool)
        assert f"'{schema}' at the top of the parameters of 'f'" in (said or "")
    assert "'$ref'" in (refused(name, Tool("f", {"$ref": "#/$defs/none"})) or "")
    with pytest.raises(ParamRefused, match="cannot spell the argument 'a>b' of the function 'f'"):
        guided(Dialects(name), [Tool("f", {"properties": {"a>b": {}}}, strict=True)])
    guided(Dialects(name), [Tool("f", {"properties": {"a>b": {}}}), Tool("g", {}, strict=True)])


def test_a_value_that_would_end_itself_is_refused() -> None:
    said = refused("qwen3_coder", Tool("f", {"properties": {"a": {"enum": ["x</parameter>"]}}}))
    assert "x</parameter>" in (said or "")
    lines = Tool("f", {"properties": {"a": {"enum": ["\nx\n"]}}})
    assert refused("qwen3_coder", lines) is None
    assert refused("seed", lines) is not None
