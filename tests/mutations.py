"""Damage to structured documents, for fuzzing: a case is a pure function of (seed, number), so it can be replayed.

Three layers, each free to go wrong in its own way: `damaged` changes a tree of plain values (keys dropped,
doubled, misspelt or moved, values of another type or size, nesting), the writers spell a tree as text in ways
that readers stumble over, `scarred` damages the bytes. Lone surrogates, NaN and numbers of any length may be in
a tree; it is the writers' work to spell them.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

DEEP = 200
ODD_TEXTS = (
    "", " ", "~", "null", "yes", "no", "0x10", "1:30", ".nan", "1e999", "9" * 400, "-", "*a", "&a", "<<", "!!str",
    "\x00", "\x1b[31m", "\u202e", "\ufeff", "\u2028", "\ud800", "\udfff\ud800", "\U0001f98a", "e\u0301", "\uffff",
    "a" * 5000, "\n", "a\tb", "{{7*7}}", "${HOME}", "../../etc/passwd", "file:///a\x00b", "file:///dev/null",
    "file://relative", "hf://a/b", "hf://a/../b", "hf://a/b@v1", "builtin://", "builtin://tiny/../x", "s3://b",
    "[", "{", "'", '"', "# x", "%", "@x", "`x`", "auto", "1Ki", "1000Gi", "0%", "100%", "30s", "0ms", "default",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63,
    2**64, -(2**63) - 1, 10**30, 10**300, [], {}, [[]], [None], {"": ""}, {"a": {"b": []}}, [1, "a", None],
    *ODD_TEXTS,
)  # fmt: skip
Tree = Any


def generator(seed: int, number: int) -> random.Random:
    """The source of chance of one case."""
    return random.Random(f"{seed}:{number}")


def damaged(rng: random.Random, tree: Tree) -> Tree:
    """A copy with one to four things wrong."""
    root = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        holder, key = rng.choice(list(_slots(root)))
        rng.choice(_DAMAGES)(rng, root, holder, key)
        if _depth(root) > DEEP // 2:
            break  # deep trees that are copied into each other end where the caller's stack does
    return root[0] if root else None


def scarred(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut short, flipped, doubled, or in another encoding."""
    at = rng.randrange(len(data) + 1)
    way = rng.randrange(8)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if way == 2:
        return (
            data[:at] + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xf4\x90\x80\x80")) + data[at:]
        )
    if way == 3:
        return data[:at] + data[rng.randrange(len(data) + 1) :]
    if way == 4:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if way == 5:
        return rng.randbytes(rng.randrange(200))
    if way == 6:
        return data[:at] + rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass") + data[at:]
    return data * rng.choice((0, 2, 3))


def as_json(rng: random.Random, tree: Tree) -> bytes:
    """JSON, sometimes with a key twice, with escapes, or with blanks where they are allowed."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 1)))
    if rng.random() < 0.08 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + "," + text[1:]  # every key of the outermost object twice
    return text.encode("utf-8", "surrogatepass")


def as_yaml(rng: random.Random, tree: Tree) -> str:
    """YAML in one of several styles, sometimes with anchors, merge keys, tags, tabs, comments or directives.

    A deep tree is written as JSON, which is YAML too: whether the writer of YAML gets to its end would depend on
    how much stack the caller has left.
    """
    if _depth(tree) > DEEP // 2:
        return json.dumps(tree)
    try:
        text = yaml.dump(
            tree,
            Dumper=yaml.CSafeDumper,
            sort_keys=False,
            allow_unicode=rng.random() < 0.5,
            default_flow_style=rng.choice((False, False, None, True)),
            width=rng.choice((20, 80, 10_000)),
            explicit_start=rng.random() < 0.2,
        )
    except UnicodeEncodeError:  # a lone surrogate
        text = json.dumps(tree)
    for _ in range(rng.choice((0, 0, 1, 2))):
        text = rng.choice(_SPELLINGS)(rng, text)
    return text


def _depth(tree: Tree) -> int:
    """How many containers deep a tree is."""
    deepest, level = 0, [tree]
    while level := [node for node in level if isinstance(node, dict | list)]:
        deepest += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return deepest


# ── damage to trees ───────────────────────────────────────────────────────────────────────────────────────


def _slots(holder: Tree) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a tree."""
    pairs = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
    for key, value in pairs:
        yield holder, key
        if isinstance(value, dict | list):
            yield from _slots(value)


def _drop(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    if holder is root:
        holder[key] = rng.choice(ODD_VALUES)
    else:
        del holder[key]


def _odd(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def _wrap(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    value = holder[key]
    holder[key] = rng.choice(([value], {"value": value}, {str(key): value}, str(value), [value] * 3))


def _misspell(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    if not isinstance(holder, dict) or not isinstance(key, str):
        return
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in key)
    spelt = rng.choice(
        (key.upper(), key[:-1], key + "s", key.replace("e", "é"), snake, f"--{key}", f" {key}", key + "\x00",
         rng.choice(ODD_TEXTS))
    )  # fmt: skip
    holder[spelt] = holder.pop(key) if rng.random() < 0.7 else copy.deepcopy(holder[key])


def _move(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    """The value stands where another one was, too."""
    target, place = rng.choice(list(_slots(root)))
    target[place] = copy.deepcopy(holder[key])


def _repeat(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, list):
        holder[key] = value * rng.choice((0, 2, 70))
    elif isinstance(value, str):
        holder[key] = value * rng.choice((0, 2, 300))
    elif isinstance(value, int | float):
        holder[key] = value * rng.choice((-1, 0, 1000, 1e300)) if abs(value) < 1e6 else -value


def _nest(rng: random.Random, root: list[Tree], holder: Any, key: Any) -> None:
    value = holder[key]
    for _ in range(rng.choice((2, 70, DEEP))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    holder[key] = value


_DAMAGES: tuple[Callable[[random.Random, list[Tree], Any, Any], None], ...] = (
    _drop, _odd, _odd, _odd, _wrap, _misspell, _misspell, _move, _repeat, _nest,
)  # fmt: skip


# ── spellings of YAML ─────────────────────────────────────────────────────────────────────────────────────


def _line(rng: random.Random, text: str, change: Callable[[str], str]) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = rng.randrange(len(lines))
    lines[at] = change(lines[at])
    return "".join(lines)


def _inserted(rng: random.Random, text: str) -> str:
    words = (
        "&a ", "*a", "<<: *a", "<<: {a: 1}", "!!python/object:os.system x", "!x ", "\t", "# ", "---\n", "...\n",
        "? ", "- ", ": ", "|\n", ">-\n", "%YAML 1.1\n---\n", "%TAG ! x\n---\n", "{", "}", "[", "]", ",", "'", '"',
        "\r", "\u2028", "\x85", "\x00", "\x07", "a: &b [*b]", *ODD_TEXTS,
    )  # fmt: skip
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(words) + text[at:]


def _indented(rng: random.Random, text: str) -> str:
    return _line(rng, text, lambda line: rng.choice(("\t", " ", "   ", "")) + line.lstrip(" "))


def _doubled(rng: random.Random, text: str) -> str:
    return _line(rng, text, lambda line: line * rng.choice((0, 2, 3)))


def _anchored(rng: random.Random, text: str) -> str:
    """A value becomes an anchor, and another line an alias to it."""
    text = _line(rng, text, lambda line: line.replace(": ", ": &a ", 1))
    return _line(rng, text, lambda line: f"{line.partition(':')[0]}: *a\n" if ":" in line else line)


def _documents(rng: random.Random, text: str) -> str:
    return f"---\n{text}" * rng.choice((2, 3)) if rng.random() < 0.5 else text.replace("\n", "\r\n")


_SPELLINGS: tuple[Callable[[random.Random, str], str], ...] = (
    _inserted, _inserted, _inserted, _indented, _doubled, _anchored, _documents,
)  # fmt: skip
