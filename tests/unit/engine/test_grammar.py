"""From a constraint to the tokens that may come next: the table of bytes, masks against brute force, what JSON
Schema means, who is refused, and what is kept. No model is run here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.effort import EFFORT, bound, examples
from tests.unit.platform import tokenizers_for_tests as made

from quire import builtin
from quire.text import Tokenizer
from quire_engine import grammar as grammar_module
from quire_engine import trial as trial_module
from quire_engine.errors import GrammarFailed, NoVocabulary, RequestRefused
from quire_engine.grammar import EARNED, SAVINGS, Grammars, Matcher, source
from quire_engine.json_schema import ecma, prepared
from quire_engine.vocabulary import Vocabulary
from quire_schemas.wire import MAX_STRUCTURED, Structured

SIZE, EOS = 2048, (2041, 2039)


def schema(value: Any, whitespace: str | None = "") -> Structured:
    return Structured("json_schema", json.dumps(value), whitespace)


def ids(bits: bytes) -> set[int]:
    return {index for index in range(8 * len(bits)) if bits[index // 8] >> index % 8 & 1}


@pytest.fixture(scope="module")
def tiny() -> Grammars:
    grammars = Grammars(builtin.path(), SIZE, EOS)
    grammars.compile(Structured("choice", '["warm"]'))  # starts the process that tries them
    return grammars


@pytest.fixture(scope="module")
def byte_of() -> dict[int, int]:
    """The token of each byte."""
    tokens = Vocabulary.read(builtin.path(), SIZE, EOS).tokens
    return {token[0]: index for index, token in enumerate(tokens) if len(token) == 1}


def takes(matcher: Matcher, text: str, byte_of: dict[int, int]) -> bool:
    """Whether the whole of `text` fits, written byte by byte."""
    output: list[int] = []
    for byte in text.encode():
        if byte_of[byte] not in ids(matcher.allowed(output)):
            return False
        output.append(byte_of[byte])
    return EOS[0] in ids(matcher.allowed(output))


# ── the table of bytes ────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_the_bytes_that_the_router_reads() -> None:
    table = Vocabulary.read(builtin.path(), SIZE, EOS)
    tokenizer = Tokenizer.load(builtin.path())
    assert table.tokens == [tokenizer.token_bytes(index) for index in range(SIZE)]
    assert table.special == {"<|endoftext|>": 2039, "<|im_start|>": 2040, "<|im_end|>": 2041}
    assert table.tokens[2042] == b"<think>"


def test_the_table_of_a_vocabulary_in_the_manner_of_sentencepiece(tmp_path: Path) -> None:
    made.write(tmp_path, made.byte_fallback())
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = Vocabulary.read(tmp_path, len(vocab), (2,)).tokens
    assert tokens[vocab["<0xE2>"]] == b"\xe2"
    assert tokens[vocab["\u2581the"]] == b" the"
    assert tokens[vocab["é"]] == "é".encode()


def test_a_table_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NoVocabulary, match=r"no tokenizer\.json"):
        Vocabulary.read(tmp_path, 10, (0,))
    words = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}
    for content, why in (("{", "cannot be read"), ("[]", "cannot be read"), (json.dumps(words), "neither")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(NoVocabulary, match=why):
            Vocabulary.read(tmp_path, 10, (0,))
    with pytest.raises(NoVocabulary, match="ends a text"):
        Vocabulary.read(builtin.path(), SIZE, ())
    refused = Grammars(tmp_path, 10, (0,))
    with pytest.raises(RequestRefused, match="this model cannot be held to one") as refusal:
        refused.compile(Structured("regex", "a"))
    assert refusal.value.code == "invalid_grammar"


# ── masks against brute force ─────────────────────────────────────────────────────────────────────────────

SMALL = [
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "bbb",
    "1",
    "12",
    "2",
    "-",
    '"',
    '":',
    "{",
    "}",
    "{}",
    "[",
    "]",
    ",",
    ":",
    "tr",
]
SMALL += ["true", "ue", "null", "nu", "ll", "0", "00", "é", "aé", "<end>"]
END = SMALL.index("<end>")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    """A vocabulary of thirty tokens, some of which begin or contain others."""
    folder = tmp_path_factory.mktemp("small")
    alphabet = {byte: char for char, byte in _alphabet().items()}
    spelled = {"".join(alphabet[byte] for byte in token.encode()): at for at, token in enumerate(SMALL[:END])}
    described = {
        "model": {"type": "BPE", "vocab": spelled},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": END, "content": "<end>", "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return Grammars(folder, len(SMALL) + 3, (END,))


def _alphabet() -> dict[str, int]:
    from quire_engine.vocabulary import _BYTE_OF

    return dict(_BYTE_OF)


def check_against(language: set[str], grammars: Grammars, structured: Structured) -> None:
    """At every place that any of the texts can come to, the mask is what trying every token gives."""
    grammar = grammars.compile(structured)
    seen: set[str] = set()
    places: list[list[int]] = [[]]
    while places:
        output = places.pop()
        text = "".join(SMALL[index] for index in output)
        if text in seen:
            continue
        seen.add(text)
        wanted = {
            index
            for index, token in enumerate(SMALL[:END])
            if any(each.startswith(text + token) for each in language)
        }
        if text in language:
            wanted.add(END)
        matcher = grammar.matcher((END,))
        if wanted:
            assert ids(matcher.allowed(output)) == wanted, (structured, text)
            assert ids(matcher.allowed(output)) == wanted, "asking twice"
        else:  # the vocabulary has no token for what would have to come
            with pytest.raises(GrammarFailed, match="no token of the vocabulary"):
                matcher.allowed(output)
        places += [[*output, index] for index in wanted - {END}]


WORDS = st.lists(st.text("ab12-", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS)
def test_masks_of_choices_are_those_of_brute_force(small: Grammars, words: list[str]) -> None:
    check_against(set(words), small, Structured("choice", json.dumps(words)))


def regexes() -> st.SearchStrategy[tuple[str, frozenset[str]]]:
    """A regular expression and all the texts it matches."""
    leaf = st.sampled_from(
        [("a", frozenset("a")), ("[ab]", frozenset("ab")), ("é", frozenset("é")), ("1?", frozenset(("", "1")))]
    )

    def grow(children: st.SearchStrategy[tuple[str, frozenset[str]]]) -> st.SearchStrategy[Any]:
        pairs = st.tuples(children, children)
        return st.one_of(
            pairs.map(lambda p: (p[0][0] + p[1][0], frozenset(x + y for x in p[0][1] for y in p[1][1]))),
            pairs.map(lambda p: (f"(?:{p[0][0]}|{p[1][0]})", p[0][1] | p[1][1])),
            children.map(lambda c: (f"(?:{c[0]}){{1,2}}", c[1] | frozenset(x + y for x in c[1] for y in c[1]))),
        )

    return st.recursive(leaf, grow, max_leaves=5).filter(lambda pair: len(pair[1]) <= 80)


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regexes())
def test_masks_of_regexes_are_those_of_brute_force(small: Grammars, pair: tuple[str, frozenset[str]]) -> None:
    check_against(set(pair[1]), small, Structured("regex", pair[0]))


def test_masks_of_json_and_lark_are_those_of_brute_force(small: Grammars) -> None:
    values = [True, None, 12, -1, "ab", "", [], {}, {"a": True}, {"a": 1, "b": "é"}, [1, [2]]]
    texts = {json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in values}
    check_against(texts, small, schema({"enum": values}))
    pairs = {f'{{"a":{a},"b":{b}}}' for a in ("true", "null") for b in ("0", "1", "2")}
    both = {
        "type": "object",
        "properties": {"a": {"enum": [True, None]}, "b": {"type": "integer", "minimum": 0, "maximum": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    check_against(pairs, small, schema(both))
    sums = {"".join(part) for n in (1, 2, 3) for part in itertools.product("12", repeat=n)}
    lark = 'start: d | d d | d d d\nd: "1" | TWO\nTWO: /2/'
    check_against(sums, small, Structured("grammar", lark))


def test_the_empty_text_is_a_text(small: Grammars) -> None:
    check_against({"", "ab"}, small, Structured("choice", '["","ab"]'))
    check_against({""}, small, Structured("regex", ""))


@pytest.mark.parametrize(
    "text", ['a"b', "a\\b", "a\nb", "a/b", "a'b", "<end>", "%json {}", "é☃🦊", "\x00\x7f", "//", "#"]
)
def test_a_choice_is_taken_to_the_letter(tiny: Grammars, byte_of: dict[int, int], text: str) -> None:
    grammar = tiny.compile(Structured("choice", json.dumps([text, "other"])))
    assert takes(grammar.matcher(EOS), text, byte_of)
    assert not takes(grammar.matcher(EOS), text + "x", byte_of)
    assert not takes(grammar.matcher(EOS), text.replace("\\", "/") if "\\" in text else text[:-1], byte_of)


# ── where a text may end ──────────────────────────────────────────────────────────────────────────────────


def test_ends_come_where_the_text_may_end_and_must_where_nothing_else_fits(
    tiny: Grammars, byte_of: dict[int, int]
) -> None:
    a, b = byte_of[ord("a")], byte_of[ord("b")]
    grammar = tiny.compile(Structured("regex", "a{1,2}b?"))

    def allowed(text: list[int], ends: tuple[int, ...] = EOS, may_end: bool = True) -> set[int]:
        return ids(grammar.matcher(ends).allowed(text, may_end=may_end))

    assert not allowed([]) & set(EOS)
    assert allowed([a]) >= {a, b, *EOS}
    assert allowed([a], may_end=False) >= {a, b}
    assert not allowed([a], may_end=False) & set(EOS)
    assert allowed([a, b]) == allowed([a, b], may_end=False) == set(EOS)
    # an end of the request's own: it ends a text that may end, and is no part of one
    assert 77 in allowed([a], (*EOS, 77))
    assert allowed([a, b], (*EOS, 77)) == {*EOS, 77}
    assert b not in allowed([a], (*EOS, b), may_end=False) | allowed([], (*EOS, b))
    # unless nothing else fits
    only = tiny.compile(Structured("choice", '["a"]'))
    assert ids(only.matcher((*EOS, a)).allowed([])) == {a}


def test_a_token_that_does_not_fit_fails_the_request_for_good(tiny: Grammars, byte_of: dict[int, int]) -> None:
    matcher = tiny.compile(Structured("regex", "ab")).matcher(EOS)
    for _ in range(2):
        with pytest.raises(GrammarFailed, match="after 0 tokens"):
            matcher.allowed([byte_of[ord("b")]])


# ── JSON Schema ───────────────────────────────────────────────────────────────────────────────────────────

NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
CLOSED = {"additionalProperties": False}
CLAIMED: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("type", {"type": "integer"}, [0, -7, 10**20], [1.5, "1", None, True, [], {}]),
    ("type number", {"type": "number"}, [0, -1.5, 1e30], ["1", None]),
    ("type list", {"type": ["string", "null"]}, ["", None], [1, False, []]),
    ("boolean", {"type": "boolean"}, [True, False], [0, "true", None]),
    ("any", {}, [1, "x", None, True, [1, ["a"]], {"a": {"b": []}}], []),
    ("enum", {"enum": [1, "a", None, [1], {"a": 1}]}, [1, "a", None, [1], {"a": 1}], [2, "b", [2], {}, True]),
    ("const", {"const": {"a": [1, "x"]}}, [{"a": [1, "x"]}], [{"a": [1]}, {}, {"a": [1, "y"]}]),
    ("const with type", {"type": "string", "const": "a\u00e9\n\"\\"}, ["a\u00e9\n\"\\"], ["a"]),
    ("minimum", {"type": "integer", "minimum": 3}, [3, 4, 100, 31], [2, -3, 0]),
    ("maximum", {"type": "integer", "maximum": -3}, [-3, -40], [-2, 0, 3]),
    ("range", {"type": "integer", "minimum": -12, "maximum": 105}, [-12, 0, 105, 99], [-13, 106, 1000]),
    ("exclusive", {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.01], [0, 1, 1.1]),
    ("number range", {"type": "number", "minimum": 1.5, "maximum": 2.25}, [1.5, 2, 2.25], [1.4, 2.26, -2]),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, [0, 7, 49, 700], [1, 8, 48]),
    ("minLength", {"type": "string", "minLength": 2}, ["ab", "éé", "🦊🦊"], ["", "a", "🦊"]),
    ("maxLength", {"type": "string", "maxLength": 2}, ["", "ab", "🦊🦊"], ["abc"]),
    ("pattern", {"type": "string", "pattern": "^[a-c]+[0-9]{2}$"}, ["a00", "abc99"], ["d00", "a0", "a000"]),
    ("pattern in the middle", {"type": "string", "pattern": "b"}, ["b", "abc"], ["", "ac"]),
    ("date", {"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2024-13-01", "x"]),
    ("date-time", {"type": "string", "format": "date-time"}, ["2024-02-29T10:00:00Z"], ["2024-02-29"]),
    ("time", {"type": "string", "format": "time"}, ["10:00:00Z"], ["25:00:00Z"]),
    ("email", {"type": "string", "format": "email"}, ["a@b.co"], ["a", ""]),
    ("ipv4", {"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["300.0.0.1", "1.2.3"]),
    ("uuid", {"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ("items", {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, "a"]]),
    ("minItems", {"type": "array", "minItems": 2}, [[1, 2], [1, "a", None]], [[], [1]]),
    ("maxItems", {"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [[], [1]], [[1, 2]]),
    (
        "prefixItems",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        [[1, "a"]],
        [["a", 1], [1], [1, "a", 2]],
    ),
    (
        "properties",
        {"type": "object", "properties": {"a": {"type": "integer"}}, **CLOSED},
        [{}, {"a": 1}],
        [{"a": ""}, {"b": 1}],
    ),
    (
        "required",
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"], **CLOSED},
        [{"b": 1}, {"a": 1, "b": None}],
        [{}, {"a": 1}],
    ),
    ("required alone", {"type": "object", "required": ["a"]}, [{"a": 1}, {"a": 1, "z": 2}], [{}, {"z": 1}]),
    (
        "additionalProperties",
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        [{"a": 1, "b": "x"}, {"z": ""}],
        [{"a": 1, "b": 2}, {"a": "x"}],
    ),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, **CLOSED},
        [{}, {"n_a": 1, "n_b": 2}],
        [{"n_a": "x"}, {"m": 1}],
    ),
    ("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ("maxProperties", {"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    (
        "anyOf",
        {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string", "maxLength": 1}]},
        [5, "a"],
        [4, "ab", None],
    ),
    ("oneOf apart", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, [5, "a"], [None, []]),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, [2, 4], [1, 5, "a"]),
    (
        "allOf of objects",
        {
            "type": "object",
            "allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1, "b": 2}],
        [{"a": 1}, {"b": 2}, {"a": "x", "b": 1}],
    ),
    ("$ref", {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, [1], ["a"]),
    ("$ref and more", {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, [3], [2, "a"]),
    (
        "recursion",
        {"$ref": "#/$defs/node", "$defs": {"node": {**NODE, "required": ["v"], **CLOSED}}},
        [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}],
        [{}, {"v": 1, "next": {}}, {"v": 1, "next": 2}],
    ),
    ("annotations", {"title": "t", "default": 1, "examples": [2], "type": "integer"}, [1], ["a"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "fits", "unfit"), [case[1:] for case in CLAIMED], ids=[case[0] for case in CLAIMED]
)
def test_what_the_docs_claim_of_json_schema(
    tiny: Grammars, byte_of: dict[int, int], value: Any, fits: list[Any], unfit: list[Any]
) -> None:
    """As jsonschema reads it, and as the case says."""
    grammar = tiny.compile(schema(value))
    reader = jsonschema.Draft202012Validator(value, format_checker=jsonschema.FormatChecker())
    for document, fitting in [*((each, True) for each in fits), *((each, False) for each in unfit)]:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        assert takes(grammar.matcher(EOS), text, byte_of) == fitting, text
        if value.get("format") not in ("date-time", "time"):  # those it knows only with more packages
            assert reader.is_valid(document) == fitting, text


FREE = {"additionalProperties": {"type": "string"}}
SPELLED: list[tuple[Any, list[str], list[str]]] = [
    # a name has one spelling, or it would not be found among the properties
    ({"properties": {"a": {"type": "integer"}}, **FREE}, ['{"a":1}', '{"b":"x"}'], ['{"\\u0061":"x"}']),
    ({"properties": {"é": {"type": "integer"}}}, ['{"é":1}'], ['{"\\u00e9":"x"}', '{"\\u00E9":"x"}']),
    ({"patternProperties": {"^a": {"type": "integer"}}}, ['{"ab":1}'], ['{"\\u0061b":"x"}']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
    ({"type": "string", "format": "date", "pattern": "^2"}, ['"2024-02-29"'], ['"1924-02-29"', '"2x"']),
    ({"type": "string", "format": "time"}, ['"23:59:59.5Z"'], ['"22:59:60Z"', '"10:00:00"']),
    ({"format": "date-time"}, ["1", '"2024-02-29T10:00:00Z"'], ['"2023-02-29T10:00:00Z"']),
    # bounds that exclude themselves, where both begin with the same number
    (
        {"type": "number", "exclusiveMinimum": 2.0, "exclusiveMaximum": 2.9},
        ["2.5", "2.01"],
        ["2", "2.0", "2.9", "3"],
    ),
    ({"exclusiveMinimum": -2.96, "exclusiveMaximum": -2}, ["-2.5", "-2.01"], ["-2", "-2.0", "-2.96", "-3"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.1"], ["0", "0.0", "-0", "0.00"]),
    ({"type": "number", "exclusiveMaximum": 3}, ["2.5", "-9"], ["3", "3.0", "2.99999999999999999999"]),
    ({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 4}, ["3"], ["2", "4"]),
    # classes of signs, as the narrowest of the engines has them
    ({"type": "string", "pattern": "^.$"}, ['"a"'], ['"\\r"', '"\u2028"', '"\\n"']),
    ({"type": "string", "pattern": "^\\S$"}, ['"a"'], ['"\ufeff"', '"\u0085"', '" "']),
    ({"type": "string", "pattern": "^\\W\\D$"}, ['"--"'], ['"é-"', '"-\u09e8"']),
    ({"type": "string", "pattern": "^[^\\W\\d]$"}, ['"a"'], ['"é"', '"-"', '"1"', '"\u09e8"']),
    ({"type": "string", "pattern": "^[a&&b[]$"}, ['"a"', '"&"', '"["'], ['"c"', '"a["']),
    ({"type": "string", "pattern": "^(a\\x01|b)$"}, ['"b"'], ['"a"', '"a\\u0001"']),
    ({"type": "string", "pattern": "^a[\\x01b]$"}, ['"ab"'], ['"a"']),
    ({"type": "string", "pattern": "^[^\\x00-\\x1f]$"}, ['"a"'], ['"\\n"', '""']),
    # bounds above double precision move inwards
    ({"type": "integer", "minimum": 2**53 + 1}, [str(2**53 + 2)], [str(2**53), str(2**53 + 1)]),
    ({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)}, ["0", "-7"], [str(2**63), str(-(2**63) - 1)]),
    ({"type": "number", "maximum": 2**63}, ["0.5", str(2**53)], [str(2**63 + 1)]),
    ({"type": "array", "maxItems": 1.0, "uniqueItems": False}, ["[1]"], ["[1,1]"]),
    ({"properties": {"enum": {"type": "integer"}}, **CLOSED}, ['{"enum":1}'], ['{"enum":"x"}']),
]


@pytest.mark.parametrize(("value", "fits", "unfit"), SPELLED, ids=[str(case[0]) for case in SPELLED])
def test_no_spelling_of_what_does_not_fit_is_accepted(
    tiny: Grammars, byte_of: dict[int, int], value: Any, fits: list[str], unfit: list[str]
) -> None:
    grammar = tiny.compile(schema(value))
    assert [text for text in fits if not takes(grammar.matcher(EOS), text, byte_of)] == []
    assert [text for text in unfit if takes(grammar.matcher(EOS), text, byte_of)] == []


WORDS_OF_SCHEMAS = [
    *(
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "patternProperties",
        "items",
        "prefixItems",
        "allOf",
        "anyOf",
    ),
    *("minimum", "exclusiveMaximum", "minProperties", "maxLength", "pattern", "format", "$ref", "$defs", "$id"),
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["date", "#/$defs/a", "[^a]\\s", "(?", "\\", "[", "integer", "http://x/y#/a"]),
    lambda parts: st.lists(parts, max_size=3)
    | st.dictionaries(st.sampled_from(WORDS_OF_SCHEMAS) | st.just("a"), parts, max_size=4),
)  # fmt: skip


@settings(max_examples=examples(100), deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS_OF_SCHEMAS), ANYTHING, min_size=1, max_size=4))
def test_whatever_stands_in_a_schema_is_read_or_refused(value: dict[str, Any]) -> None:
    before = json.dumps(value)
    with contextlib.suppress(RequestRefused):
        json.dumps(prepared(value))
    assert json.dumps(value) == before


def test_a_long_pattern_is_read_in_little_time() -> None:
    began = time.thread_time()
    for part in ("a", "(?:", "[a", "\\x41", "[^\\s]"):
        ecma(part * (60_000 // len(part)))
    assert time.thread_time() - began < bound(0.5)


UNSUPPORTED: list[tuple[Any, str]] = [
    ({"const": "a\x01b"}, "const with a control character"),
    ({"enum": [{"a\x7f": 1}]}, "enum with a control character"),
    ({"const": 2**53 + 1}, "const with 9007199254740993, which is not exact"),
    ({"enum": [[10**400]]}, "which is not exact"),
    ({"type": "number", "minimum": 2**60}, "minimum beyond"),
    ({"properties": {"default": {"minProperties": 5}}}, "minProperties above 1"),
    ({"minProperties": 2, "required": ["a", "a"]}, "minProperties above 1"),
    ({"type": "string", "maxLenght": 3}, "maxLenght is no keyword of JSON Schema; did you mean maxLength?"),
    ({"properties": {"a": {"nullable": True}}}, "nullable is no keyword of JSON Schema; a type may be a list"),
    ({"type": "string", "minLength": 10**12}, "minLength above 2147483647"),
    ({"type": "integer", "multipleOf": -1}, "multipleOf -1; it has to be above 0"),
    ({"$ref": "#/default", "default": {"minProperties": 5}}, "$ref to what is no schema, #/default"),
    ({"$ref": "#/enum/0", "enum": [{"type": "string"}]}, "$ref to what is no schema"),
    ({"properties": {"a": {"$id": "http://x/", "$ref": "y"}}}, "$ref beside $id"),
    ({"$ref": "http://x/y#/$defs/a"}, "another document, http://x/y#/$defs/a"),
    ({"type": "string", "pattern": "[]a]"}, "in a pattern: []"),
    ({"type": "string", "pattern": "[a--b]"}, "in a pattern: --"),
    ({"type": "string", "pattern": "(?x)a b"}, "in a pattern: (?x"),
    ({"patternProperties": {"\\a": {}}}, "in a pattern: \\a"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    ({"type": "array", "contains": {"const": 1}}, '"contains"'),
    ({"if": {"type": "integer"}, "then": {"minimum": 1}}, '"if", "then"'),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, '"propertyNames"'),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, '"dependentRequired"'),
    ({"type": "object", "unevaluatedProperties": False}, '"unevaluatedProperties"'),
    ({"type": "object", "minProperties": 2}, "minProperties above 1"),
    ({"properties": {"a": {"items": {"minProperties": 3, "required": ["x"]}}}}, "minProperties above 1"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf with alternatives that may both fit"),
    ({"$ref": "https://example.com/other"}, "another document, https://example.com/other"),
    ({"type": "string", "format": "iri-reference"}, "iri-reference"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ({"$ref": "#"}, "no text satisfies it"),
    ({"type": "objekt"}, "objekt"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
]


@pytest.mark.parametrize(("value", "named"), UNSUPPORTED, ids=[case[1] for case in UNSUPPORTED])
def test_what_is_not_supported_is_named(tiny: Grammars, value: Any, named: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(named)) as refusal:
        tiny.compile(schema(value))
    assert refusal.value.code == "invalid_grammar"
    assert "llguidance" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_whitespace_in_json_is_what_was_asked_for(tiny: Grammars, byte_of: dict[int, int]) -> None:
    value = {"type": "array", "items": {"type": "integer"}}
    forms = ["[1,2]", "[1, 2]", "[\n  1,\n  2\n]", "[ " + " " * 40 + "1]"]
    for whitespace, fitting in ((None, 3), ("", 1), (" ?", 2), (r"[ \n]{0,50}", 4)):
        grammar = tiny.compile(schema(value, whitespace))
        fits = [takes(grammar.matcher(EOS), text, byte_of) for text in forms]
        assert fits == [number < fitting for number in range(len(forms))], whitespace


# ── the other kinds ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("regex", "fits", "unfit"),
    [
        (r"\d{3}-[a-z]+", ["123-a"], ["12-a", "123-"]),
        (r"^a/b$", ["a/b"], ["a", "a/bc"]),
        (r"(?i)yes|no", ["YES", "No"], ["maybe"]),
        (r"[^\n]*\.", ["A sentence."], ["A sentence", "a\n."]),
        (r"\\\"\x41\u00e9", ['\\"Aé'], ["A"]),
    ],
)
def test_a_regex_is_for_the_whole_text(
    tiny: Grammars, byte_of: dict[int, int], regex: str, fits: Iterable[str], unfit: Iterable[str]
) -> None:
    grammar = tiny.compile(Structured("regex", regex))
    assert all(takes(grammar.matcher(EOS), text, byte_of) for text in fits)
    assert not any(takes(grammar.matcher(EOS), text, byte_of) for text in unfit)


def test_a_lark_grammar_with_recursion(tiny: Grammars, byte_of: dict[int, int]) -> None:
    lark = 'start: sum\nsum: term | sum ("+" | "-") term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/'
    grammar = tiny.compile(Structured("grammar", lark))
    for text in ("1", "1+2", "(1+(2-3))-44"):
        assert takes(grammar.matcher(EOS), text, byte_of)
    for text in ("", "1+", "(1", "1)", "a"):
        assert not takes(grammar.matcher(EOS), text, byte_of)


def tag(*structures: tuple[str, Any, str], triggers: list[str]) -> Structured:
    described = [{"begin": begin, "schema": value, "end": end} for begin, value, end in structures]
    return Structured("structural_tag", json.dumps({"structures": described, "triggers": triggers}), "")


def test_a_structural_tag_binds_from_its_trigger_on(tiny: Grammars, byte_of: dict[int, int]) -> None:
    number, word = {"type": "integer"}, {"type": "string", "maxLength": 3}
    tags = tag(("<f=num>", number, "</f>"), ("<f=word>", word, "</f>"), triggers=["<f=", "<f=w"])
    grammar = tiny.compile(tags)
    for text in ("", "free < text", "<f=num>1</f>", 'so: <f=word>"a"</f> and <f=num>2</f>, done'):
        assert takes(grammar.matcher(EOS), text, byte_of), text
    for text in ("<f=", "<f=other>", "<f=num>x</f>", '<f=word>"abcd"</f>', "<f=num>1</g>", "<f=num>1"):
        assert not takes(grammar.matcher(EOS), text, byte_of), text


def test_special_tokens_in_a_structural_tag_are_the_tokens(tiny: Grammars, byte_of: dict[int, int]) -> None:
    start, a, one = 2040, byte_of[ord("a")], byte_of[ord("1")]
    matcher = tiny.compile(
        tag(("<|im_start|>a", {"type": "integer"}, "<|im_start|>"), triggers=["<|im_start|>"])
    ).matcher(EOS)
    assert start in ids(matcher.allowed([]))
    assert ids(matcher.allowed([start])) == {a}
    assert one in ids(matcher.allowed([start, a]))
    assert start in ids(matcher.allowed([start, a, one]))
    assert EOS[0] in ids(matcher.allowed([start, a, one, start]))


@pytest.mark.parametrize(
    ("structured", "why"),
    [
        (Structured("regex", "a["), "unclosed character class"),
        (Structured("regex", r"(a)\1"), "backreferences"),
        (Structured("grammar", 'start: "a" other'), 'line 1, column 8: unknown name: "other"'),
        (Structured("grammar", '# two lines\nstart: "a" other'), "line 2, column 8"),
        (Structured("grammar", 'root ::= "a"'), "this is GBNF"),
        (Structured("grammar", "start: x\nx[lazy, temperature=2.0]: /a+/"), "not supported in a grammar: tem"),
        (Structured("grammar", '%llguidance {"a": 1}\nstart: "a"'), "not supported in a grammar: %llguidance"),
        (Structured("grammar", 'start: "x" a\na: "y" a', None), ""),
        (tag(("<f>", {}, ""), triggers=["<g>"]), "none of the triggers"),
        (tag(triggers=["<g>"]), "no structures"),
        (tag(("<|im_end|>x", {}, ""), triggers=["<|im_end|>x"]), "a special token and more"),
        (Structured("structural_tag", "{}"), "must have 'triggers' and 'structures'"),
        (Structured("json_schema", "[]"), "no JSON object"),
    ],
)
def test_a_constraint_that_is_wrong_is_refused_with_the_place(
    tiny: Grammars, structured: Structured, why: str
) -> None:
    if not why:  # it never ends, and that is for max_tokens to see to
        assert ids(tiny.compile(structured).matcher(EOS).allowed([]))
        return
    with pytest.raises(RequestRefused, match=re.escape(why)):
        tiny.compile(structured)


# ── hostile ones ──────────────────────────────────────────────────────────────────────────────────────────

CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'
HOSTILE = {
    "parentheses": Structured("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "counts in counts": Structured("regex", "((a{0,100}){0,100}){0,100}"),
    "a chain of rules": Structured("grammar", CHAIN),
    "a chain of terminals": Structured("grammar", CHAIN.replace("r", "R").replace("staRt", "start")),
    "10 MB": Structured("json_schema", json.dumps({"enum": ["x" * 100] * 100_000})),
    "too many properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    "deep schema": Structured("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "products": schema({"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)]}),
    "a large multiple": schema({"type": "integer", "multipleOf": 1_000_000_007}),
    "a circle": Structured("grammar", "start: A\nA: B\nB: A"),
}  # fmt: skip
NEUTRAL = {"regex": "z", "grammar": "\n", "json_schema": " "}
"""By kind, what makes another one that is as hostile."""
HARMLESS = {
    "nested stars": Structured("regex", "((a+)+)+b"),
    "optional pairs": Structured("regex", "(a?){60}a{60}"),
    "a long run": Structured("regex", "a{1000000}"),
    "left recursion": Structured("grammar", 'start: a\na: a "x" | "y"'),
    "a long constant": schema({"const": "x" * 60_000}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_refused_within_half_a_second(tiny: Grammars, name: str) -> None:
    """The best of three that are alike: it is tried in a process, beside whatever else the machine does."""
    hostile, took = HOSTILE[name], [bound(0.5)]
    for more in range(3):
        if min(took) >= bound(0.5):
            another = msgspec.structs.replace(hostile, text=hostile.text + more * NEUTRAL[hostile.kind])
            began = time.monotonic()
            with pytest.raises(RequestRefused) as refusal:
                tiny.compile(another)
            took.append(time.monotonic() - began)
    assert min(took) < bound(0.5), took
    assert refusal.value.code == "invalid_grammar"
    assert len(str(refusal.value)) < 400
    began = time.monotonic()
    with pytest.raises(RequestRefused):  # and is remembered
        tiny.compile(HOSTILE[name])
    assert time.monotonic() - began < bound(0.01)
    assert tiny.compile(Structured("choice", json.dumps(["still", "there", name])))


def test_what_the_machine_is_to_blame_for_is_no_verdict(tiny: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    structured = Structured("regex", "[xyz]+ once more")
    monkeypatch.setattr(trial_module, "WALL_SECONDS", 0.0)
    with pytest.raises(RequestRefused, match="cannot be tried now: the machine is too busy") as refusal:
        tiny.compile(structured)
    assert refusal.value.code == "queue_full"
    monkeypatch.undo()
    assert tiny.compile(structured)


def test_an_ending_id_outside_the_vocabulary_is_never_drawn(tiny: Grammars) -> None:
    matcher = tiny.compile(Structured("choice", '["a"]')).matcher((*EOS, 10**6))
    assert ids(matcher.allowed([]))


def test_data_in_a_schema_is_not_taken_for_a_schema(tiny: Grammars) -> None:
    assert tiny.compile(schema({"enum": [{"minProperties": 5}, 1]}))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_hostile_and_costs_nothing_is_served(
    tiny: Grammars, byte_of: dict[int, int], name: str
) -> None:
    """A thousand tokens of it; each mask within what one token of a small model takes."""
    matcher = tiny.compile(HARMLESS[name]).matcher(EOS)
    output: list[int] = []
    slowest = 0.0
    for _ in range(1000):
        began = time.monotonic()
        fitting = sorted(ids(matcher.allowed(output, may_end=False)) - set(EOS))
        slowest = max(slowest, time.monotonic() - began)
        if not fitting:
            break
        output.append(fitting[len(output) % len(fitting)])
    assert slowest < bound(0.05)


COSTLY = {
    "many states": Structured("regex", "([ab]*a[ab]{18}){1,20}"),
    "many readings": Structured("grammar", 'start: a\na: a a | a "x" | "y" |'),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_constraint_that_grows_costly_ends_its_request_alone(tiny: Grammars, name: str) -> None:
    """All that a request can spend on eight hundred random tokens is what it earns with them."""
    matcher = tiny.compile(COSTLY[name]).matcher(EOS)
    began = time.thread_time()
    output: list[int] = []
    state = 1
    failed = ""
    while len(output) < 800 and not failed:
        state = state * 48271 % (2**31 - 1)
        try:
            fitting = sorted(ids(matcher.allowed(output, may_end=False)))
            output.append(fitting[state % len(fitting)])
        except GrammarFailed as error:
            failed = str(error)
    assert re.fullmatch("(.* after \\d+ tokens.*)?", failed)
    # and what the test itself does with each mask
    assert time.thread_time() - began < 2 * SAVINGS + (EARNED + 0.002) * len(output)
    if name == "many readings":
        assert "costs too much" in failed
        with pytest.raises(GrammarFailed):
            matcher.allowed(output)


# ── compiled once, kept a while ───────────────────────────────────────────────────────────────────────────


def test_the_same_constraint_is_compiled_once_however_many_ask() -> None:
    grammars = Grammars(builtin.path(), SIZE, EOS)
    with ThreadPoolExecutor(8) as pool:
        same = set(pool.map(lambda _: id(grammars.compile(Structured("regex", "[a-f]{3}"))), range(32)))
    assert len(same) == 1


def test_what_is_kept_is_bounded_by_number_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(builtin.path(), SIZE, EOS)
    monkeypatch.setattr(grammar_module, "KEPT_GRAMMARS", 20)
    for number in range(24):
        grammars.compile(Structured("choice", json.dumps([str(number)])))
    assert len(grammars._kept) == 20
    assert Structured("choice", '["0"]') not in grammars._kept
    monkeypatch.setattr(grammar_module, "KEPT_BYTES", 10 << 20)
    for number in range(12):
        grammars.compile(Structured("choice", json.dumps([f"{number:05}" + "x" * 60_000])))
    assert 60_000 < grammars.kept_bytes <= 10 << 20
    assert 0 < len(grammars._kept) < 12
    assert Structured("choice", json.dumps(["00011" + "x" * 60_000])) in grammars._kept, "the latest"


def test_a_grammar_that_is_full_fails_its_request_and_not_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one request has found out about a grammar stays in it, for all that use it."""
    monkeypatch.setattr(grammar_module, "SAVINGS", 100.0)
    monkeypatch.setattr(grammar_module, "GROWTH", 0)
    monkeypatch.setattr(grammar_module, "LIMITS", llguidance.LLParserLimits(max_lexer_states=1000))
    grammars = Grammars(builtin.path(), SIZE, EOS)
    choose = random.Random(1)

    def written() -> str:
        matcher = grammars.compile(COSTLY["many states"]).matcher(EOS)
        output: list[int] = []
        try:
            for _ in range(700):
                output.append(choose.choice(sorted(ids(matcher.allowed(output, may_end=False)))))
        except GrammarFailed as error:
            return str(error)
        return "whole"

    first = grammars.compile(COSTLY["many states"])
    said = [written() for _ in range(4)]
    assert any("too many states" in each for each in said)
    assert not any("after 0 tokens" in each for each in said), "the next has a new one"
    renewed = grammars.compile(COSTLY["many states"])
    assert renewed is not first
    assert ids(renewed.matcher(EOS).allowed([]))


def test_a_grammar_much_used_is_compiled_anew() -> None:
    grammars = Grammars(builtin.path(), SIZE, EOS)
    first = grammars.compile(Structured("regex", "[a-d]{5}"))
    assert grammars.compile(Structured("regex", "[a-d]{5}")) is first
    first.spent = 1.0
    assert grammars.kept_bytes > grammar_module.MOST_GROWN
    assert grammars.compile(Structured("regex", "[a-d]{5}")) is not first
    assert grammars.kept_bytes < grammar_module.MOST_GROWN


def test_a_constraint_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(builtin.path(), SIZE, EOS)
    many = Structured("choice", json.dumps([f"{number * 7919 % 100_003:05}" for number in range(3000)]))
    assert grammars.compile(many)
    monkeypatch.setattr(grammar_module, "MAX_BYTES", 1 << 20)
    with pytest.raises(RequestRefused, match="it takes more than 1 MiB when compiled"):
        grammars.compile(Structured("choice", many.text + " "))


def test_no_more_than_so_many_wait_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_COMPILING", 2)
    grammars = Grammars(builtin.path(), SIZE, EOS)
    slow = [grammars.submit(Structured("regex", f"a{{{n}}}")) for n in range(1, 3)]
    late = [grammars.submit(Structured("regex", f"b{{{n}}}")) for n in range(1, 20)]
    refused = [future.exception() for future in late]
    assert all(future.result() for future in slow)
    assert [error.code for error in refused if isinstance(error, RequestRefused)].count("queue_full") > 0
    assert grammars.compile(Structured("regex", "b{1}")), "a refusal for lack of room is not remembered"


def slow_one(number: int) -> Structured:
    """A constraint that takes all the time it is given, or much of it."""
    return [
        Structured("regex", f"((a{{0,100}}){{0,100}}){{0,{101 + number}}}"),
        schema({"type": "integer", "multipleOf": 1_000_000_007 + number}),
    ][number % 2]


@pytest.mark.parametrize("many", [1, 8, 64])
def test_who_is_usual_does_not_wait_for_who_is_hostile(tiny: Grammars, many: int) -> None:
    """An ordinary schema is next but one, whatever waits; all that is hostile is refused in the end."""
    hostile = [tiny.submit(slow_one(100 * many + number)) for number in range(many)]
    began = time.monotonic()
    usual = {"type": "object", "properties": {f"of {many}": {"type": "string"}, "n": {"type": "integer"}}}
    assert tiny.compile(schema(usual))
    waited = time.monotonic() - began
    print(f"{waited:.3f} s beside {many}")
    assert waited < bound(1.5)
    assert sum(future.done() for future in hostile) <= max(2, many // 2), "it did not wait for all"
    if many == 1 or EFFORT > 1:
        assert all(isinstance(future.exception(), RequestRefused) for future in hostile)


def test_a_full_second_queue_refuses_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_SLOW", 0)
    grammars = Grammars(builtin.path(), SIZE, EOS)
    slow = slow_one(901)
    refused = grammars.submit(slow).exception()
    assert isinstance(refused, RequestRefused)
    assert refused.code == "queue_full"
    assert not grammars._kept
    monkeypatch.setattr(grammar_module, "MAX_SLOW", 1)
    verdict = grammars.submit(slow).exception()
    assert isinstance(verdict, RequestRefused)
    assert verdict.code == "invalid_grammar"
    assert list(grammars._kept) == [slow], "only a verdict is remembered"


def test_a_constraint_above_the_limit_is_refused_before_anything_is_read(tiny: Grammars) -> None:
    long = Structured("regex", "é" * (MAX_STRUCTURED // 2) + "a")
    with pytest.raises(RequestRefused, match=f"more than {MAX_STRUCTURED} bytes"):
        source(long, {})
