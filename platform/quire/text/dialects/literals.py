"""Literals of Python as JSON, for dialects that write values as Python does.

Nothing is evaluated. Strings are read as Python reads them: a backslash that escapes nothing stays (`'\\d'`).
Neighbouring strings are one, tuples are lists, and the names of a dictionary's members become strings. How deep a
literal is, and how many values it has, is bounded, so that reading one takes milliseconds.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from json.encoder import encode_basestring
from typing import Final

_MAX_DEPTH: Final = 100
_MAX_VALUES: Final = 1 << 14
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?\Z")
_WHOLE: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?\Z")
_SPACE: Final = re.compile(r"[ \t\r\n\f]*+")
_WORD: Final = re.compile(r"[A-Za-z]++")
_WORDS: Final = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_FIGURES: Final = re.compile(
    r"[-+]?(?:0[xXoObB][0-9A-Fa-f_]++|(?:[0-9][0-9_]*+\.?[0-9_]*+|\.[0-9][0-9_]*+)(?:[eE][-+]?[0-9][0-9_]*+)?)"
    r"(?![0-9A-Za-z_.])"
)
_STRING: Final = re.compile(
    r"(?P<prefix>[rRuU]?)(?:"
    r'"""(?P<a>[^"\\]*+(?:(?:\\(?s:.)|"(?!""))[^"\\]*+)*+)"""|'
    r"'''(?P<b>[^'\\]*+(?:(?:\\(?s:.)|'(?!''))[^'\\]*+)*+)'''|"
    r'"(?P<c>[^"\\\n]*+(?:\\(?s:.)[^"\\\n]*+)*+)"|'
    r"'(?P<d>[^'\\\n]*+(?:\\(?s:.)[^'\\\n]*+)*+)')"
)
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<x>[0-9A-Fa-f]{2})|u(?P<u>[0-9A-Fa-f]{4})|U(?P<w>[0-9A-Fa-f]{8})"
    r"|N\{(?P<name>[^}]*)\}|(?P<sign>(?s:.)))"
)
_SIGNS: Final = {
    "\n": "", "\\": "\\", "'": "'", '"': '"',
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"
}  # fmt: skip


def is_number(text: str, *, whole: bool = False) -> bool:
    """Whether a text is a number of JSON; with `whole` one without a fraction."""
    return (_WHOLE if whole else _NUMBER).match(text) is not None


def python_or_json(written: str) -> str | None:
    """A literal of JSON, as it is, or of Python, as JSON; None if it is neither."""
    try:
        json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    else:
        return written
    reader = _Reader(written)
    try:
        reader.space()
        reader.value(0)
        reader.space()
    except ValueError:
        return None
    return "".join(reader.out) if reader.at == len(written) else None


def sound(text: str) -> str:
    """A text that UTF-8 can hold: halves of a character that escapes have left in it are joined, and one without
    its other is U+FFFD.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class _Reader:
    """Goes through one literal; `out` is what was read of it. All of it raises ValueError where it is none."""

    __slots__ = ("at", "out", "text", "values")

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.out: list[str] = []
        self.values = 0

    def space(self) -> None:
        self._match(_SPACE)

    def value(self, depth: int) -> None:
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:
            raise ValueError(f"it is too large at {self.at}")
        opening = self.text[self.at : self.at + 1]
        if opening in ("[", "(", "{"):
            self.at += 1
            self._container(opening, depth)
        else:
            self.out.append(self._scalar(self._string()))

    def _container(self, opening: str, depth: int) -> None:
        closing = {"[": "]", "(": ")", "{": "}"}[opening]
        begun = len(self.out)
        self.out.append("{" if opening == "{" else "[")
        count, comma = 0, True
        while True:
            self.space()
            if self._accept(closing):
                break
            if not comma:
                raise ValueError(f"no comma at {self.at}")
            if count:
                self.out.append(", ")
            if opening == "{":
                self._member(depth)
            else:
                self.value(depth + 1)
            count += 1
            self.space()
            comma = self._accept(",")
        if opening == "(" and count == 1 and not comma:  # brackets around a value are no tuple
            self.out[begun] = ""
        else:
            self.out.append("}" if opening == "{" else "]")

    def _member(self, depth: int) -> None:
        name = self._string()
        self.out.append(encode_basestring(self._scalar(None)) if name is None else self._scalar(name))
        self.space()
        if not self._accept(":"):
            raise ValueError(f"no colon at {self.at}")
        self.out.append(": ")
        self.space()
        self.value(depth + 1)

    def _accept(self, sign: str) -> bool:
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) * found
        return found

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found

    def _scalar(self, text: str | None) -> str:
        """JSON of a string that was read, or of the word or number that stands here."""
        if text is not None:
            return encode_basestring(sound(text))
        if (word := self._match(_WORD)) is not None:
            if word[0] not in _WORDS:
                raise ValueError(f"no literal at {self.at}")
            return _WORDS[word[0]]
        if (figures := self._match(_FIGURES)) is None:
            raise ValueError(f"no literal at {self.at}")
        return _number(figures[0])

    def _string(self) -> str | None:
        """The text of the string, or of the neighbouring strings, that stand here, if there are any."""
        pieces: list[str] = []
        while (found := self._match(_STRING)) is not None:
            text = next(text for text in found.group("a", "b", "c", "d") if text is not None)
            pieces.append(text if found["prefix"] in ("r", "R") else _ESCAPE.sub(_meant, text))
            self.space()
        return "".join(pieces) if pieces else None


def _meant(found: re.Match[str]) -> str:
    if (octal := found["octal"]) is not None:
        return chr(int(octal, 8))
    if (code := found["x"] or found["u"] or found["w"]) is not None:
        return chr(int(code, 16))  # raises ValueError beyond the last character
    if (name := found["name"]) is not None:
        try:
            return unicodedata.lookup(name)
        except KeyError as error:
            raise ValueError(f"no character has this name: {error}") from None
    sign = found["sign"]
    if sign in "xuUN":
        raise ValueError(f"an escape breaks off: \\{sign}")
    return _SIGNS.get(sign, found[0])


def _number(figures: str) -> str:
    if is_number(figures):
        return figures
    if not any(sign in figures for sign in ".eE") or figures.lstrip("+-")[:2] in ("0x", "0X"):
        return str(int(figures, 0))  # raises ValueError beyond some thousand digits, too
    number = float(figures)
    if not math.isfinite(number):
        raise ValueError(f"JSON has no {number}")
    return repr(number)
