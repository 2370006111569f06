"""A checkpoint's tokenizer and chat template, read without `transformers` (which would load torch).

`Tokenizer.load` reads from one folder `tokenizer.json` (the whole of the tokenization), `tokenizer_config.json`
(names of special tokens, often the chat template), `special_tokens_map.json`, `chat_template.jinja` or
`chat_template.json`, and `generation_config.json` (sampling the model's makers advise).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import tokenizers

from quire.text.dialects import REASONING, Dialects, Thoughts, detect
from quire.text.errors import BadTokenizer, NoChatTemplate, TextError
from quire.text.templates import ChatTemplate
from quire_schemas import wire

_LONG_TEXT: Final = 16 * 1024
_LONG_IDS: Final = 4 * 1024
"""From here on the library is asked for a batch of one: that alone lets other threads run meanwhile."""
_COMPOSED: Final = 4
"""Normalization to NFC leaves at least one byte of so many."""
_SPECIAL_NAMES: Final = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True, slots=True)
class AdvisedSampling:
    """Sampling that `generation_config.json` asks for; None where it says nothing.

    `do_sample: false` there means greedy, which is temperature 0 here.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each of the 256 bytes, reversed.

    Printable bytes of Latin-1 stand for themselves; the others are numbered upwards from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF: Final = _byte_alphabet()


class Tokenizer:
    """Text to ids and back for one checkpoint. Immutable once loaded; may be used from any thread."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None,
        advised: AdvisedSampling,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.template = template
        self.advised = advised
        self._texts: dict[int, str] = {}
        """Of tokens that were asked for one by one."""
        self._bytes: dict[int, bytes] = {}
        """Of those whose bytes were: an answer asks for those of each of its tokens."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder().items()
        self._specials = {token.content: index for index, token in added if token.special}
        self.special_ids = frozenset(index for index, token in added if token.special)
        whole = backend.to_str()
        described = [whole, self.special_tokens, template.source if template is not None else None]
        self.fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        """The same for two tokenizers that make the same ids of the same request."""
        parsed: dict[str, Any] = json.loads(whole)
        self._token_span = _most_bytes(parsed)
        """Bytes of a text that one id stands for at most; 0 if that is not known."""
        decoder = parsed.get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        self.byte_level: bool = [part.get("type") for part in parts] == ["ByteLevel"]
        """Each token is a fixed run of bytes: decoding is joining them."""

    @classmethod
    def load(cls, folder: Path, chat_template: str | Path | None = None) -> Tokenizer:
        """Read `folder`; `chat_template`, a text or its file, takes the place of the checkpoint's own template.

        Raises `BadTokenizer` and `BadTemplate`. A checkpoint without a chat template is fine until one is needed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadTokenizer("the checkpoint has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise BadTokenizer("the checkpoint's tokenizer.json cannot be read") from error
        config = _json_object(folder / "tokenizer_config.json")
        special = _special_tokens({**_json_object(folder / "special_tokens_map.json"), **config})
        if isinstance(chat_template, str):
            source: str | None = chat_template
        else:
            source = _template_source(folder, config, chat_template)
        template = ChatTemplate(source, special) if source is not None else None
        return cls(backend, special, template, _advised(_json_object(folder / "generation_config.json")))

    @classmethod
    def attempt(cls, folder: Path, chat_template: str | Path | None = None) -> Tokenizer | TextError:
        """What `load` gives, or why there is none: a checkpoint's files are never a reason to stop."""
        try:
            return cls.load(folder, chat_template)
        except TextError as error:
            return error
        except BaseException as error:  # noqa: BLE001 - a panic of the tokenizers library is no `Exception`
            broken = BadTokenizer("the checkpoint's tokenizer cannot be loaded")
            broken.__cause__ = error
            return broken

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. `add_special_tokens` puts what the tokenizer puts around a text (BOS, …)."""
        if len(text) < _LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def least_tokens(self, text: str) -> int:
        """So many ids `text` has at least, by its length alone; 0 where this vocabulary gives no such bound."""
        return -(-len(text.encode()) // self._token_span) if self._token_span else 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` as a whole. Ids outside the vocabulary have no text."""
        if len(ids) < _LONG_IDS:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as prompt text: see `ChatTemplate.render`. Raises `NoChatTemplate` too."""
        if self.template is None:
            raise NoChatTemplate("this model has no chat template")
        return self.template.render(
            messages, tools, documents, add_generation_prompt, continue_final_message, **variables
        )

    def knows(self, index: int) -> bool:
        """Whether the id is in the vocabulary; a model's logits may have more rows than its tokenizer has ids."""
        return self._backend.id_to_token(index) is not None

    def spell(self, ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary as it writes them (`Ġthe`); empty for an id that it does not have."""
        spelling = self._backend.id_to_token
        return [spelling(index) or "" for index in ids]

    def token_text(self, index: int) -> str:
        """The token as a user may read it: its text, with U+FFFD where it is part of a character."""
        text = self._texts.get(index)
        if text is None:
            text = self._texts[index] = self.decode([index], skip_special_tokens=False)
        return text

    @cached_property
    def keys(self) -> dict[int, str]:
        """A name for each id of the vocabulary that no other has: what it stands for inside a text.

        Part of a character is written `bytes:\\xe2\\x80`. Of several ids with one text the lowest has it as name,
        a byte-fallback token if there is no other, and the rest are `token_id:5`. Takes a moment the first
        time: about 0.3 s for 100,000 ids.
        """
        taken: set[str] = set()
        keys: dict[int, str] = {}
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        for index in sorted(ids, key=lambda index: (index in self.byte_tokens, index)):
            key = _escaped(self.token_bytes(index))
            keys[index] = f"token_id:{index}" if key in taken else key
            taken.add(key)
        return keys

    def token_bytes(self, index: int) -> bytes:
        """The bytes a token stands for inside a text; empty for an id outside the vocabulary."""
        found = self._bytes.get(index)
        if found is None:
            token = self._backend.id_to_token(index)
            if token is None:
                return b""
            found = self._bytes[index] = self._made_bytes(index, token)
        return found

    def _made_bytes(self, index: int, token: str) -> bytes:
        if self.byte_level:
            values = [_BYTE_OF.get(char) for char in token]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else token.encode()
        if is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        once = self.decode([index], skip_special_tokens=False)  # at the beginning, where its space may be left out
        twice = self.decode([index, index], skip_special_tokens=False)
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    @property
    def end(self) -> tuple[str, int] | None:
        """The token that the checkpoint's tokenizer calls the end of a text, and its id."""
        token = self.special_tokens.get("eos_token")
        index = self._backend.token_to_id(token) if token is not None else None
        return None if token is None or index is None else (token, index)

    @cached_property
    def dialects(self) -> Dialects:
        """How calls and thoughts are written, by what the chat template shows."""
        source = self.template.source if self.template is not None else None
        return detect(source, {token.content for token in self._backend.get_added_tokens_decoder().values()})

    def special_among(self, texts: Collection[str]) -> frozenset[int]:
        """The special tokens that are one of `texts`."""
        return frozenset(self._specials[text] for text in texts if text in self._specials)

    @cached_property
    def thinking(self) -> tuple[int, int] | None:
        """The tokens that open and close a thought; None if there are no such added tokens.

        Only added tokens will do: what is split into several may be written in several ways.
        """
        added = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        for dialect in REASONING.values():
            if isinstance(dialect, Thoughts) and dialect.opening in added and dialect.closing in added:
                return added[dialect.opening], added[dialect.closing]
        return None

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids of tokens that are one raw byte each (`<0xE2>`), as byte-fallback vocabularies have them."""
        return frozenset(index for token, index in self._backend.get_vocab().items() if is_byte_token(token))


def is_byte_token(token: str) -> bool:
    """Whether a vocabulary entry is the byte-fallback spelling of one byte."""
    return (
        len(token) == 6
        and token.startswith("<0x")
        and token.endswith(">")
        and all(c in "0123456789ABCDEFabcdef" for c in token[3:5])
    )


def _escaped(raw: bytes) -> str:
    """The text that the bytes are, or if they are none the bytes by their numbers."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _most_bytes(backend: Mapping[str, Any]) -> int:
    """The most bytes of a text that one id can stand for, or 0 where nothing bounds them.

    `backend` is a `tokenizer.json`. Bytes are only ever lost where a normalizer or pre-tokenizer drops them, an
    added token swallows the white space beside it, or what is not in the vocabulary becomes one unknown token or
    none. A BPE whose vocabulary has every byte, behind steps that are known to drop nothing, does none of that.
    """
    model, added = backend["model"], backend["added_tokens"]
    vocab = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict):
        return 0
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return 0
    kept = _kept_by(backend.get("normalizer"), "normalizers")
    steps = list(_steps(backend.get("pre_tokenizer"), "pretokenizers"))
    if not kept or not all(_drops_nothing(step) for step in steps):
        return 0
    if any(step["type"] == "ByteLevel" for step in steps):
        whole, longest = _BYTE_OF.keys() <= vocab.keys(), max(map(len, vocab), default=0)
    else:
        whole = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        longest = max((len(token.encode()) for token in vocab), default=0)
    if not whole:
        return 0
    return kept * max([longest, *(len(token["content"].encode()) for token in added)])


def _steps(part: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of others."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for each in part[inside]:
            yield from _steps(each, inside)
    else:
        yield part


def _drops_nothing(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer hands on all of its text."""
    kind = step["type"]
    if kind in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    return kind in ("ByteLevel", "Metaspace", "Digits")


def _kept_by(normalizer: Mapping[str, Any] | None, inside: str) -> int:
    """A normalizer leaves at least one byte of so many; 0 where that is not known."""
    kept = 1
    for step in _steps(normalizer, inside):
        if step["type"] == "NFC":
            kept *= _COMPOSED
        elif step["type"] == "Replace":
            plain = step["pattern"].get("String")
            if plain is None or len(step["content"].encode()) < len(plain.encode()):
                return 0
        elif step["type"] != "Prepend":
            return 0
    return kept


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadTokenizer(f"the checkpoint's {path.name} cannot be read") from error
    if not isinstance(value, dict):
        raise BadTokenizer(f"the checkpoint's {path.name} is not a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a token is written as a string or as an object with its `content`."""
    named: dict[str, str] = {}
    extra = config.get("model_specific_special_tokens")
    for name, value in {**(extra if isinstance(extra, dict) else {}), **config}.items():
        if name not in _SPECIAL_NAMES and not (isinstance(extra, dict) and name in extra):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _template_source(folder: Path, config: Mapping[str, Any], chosen: Path | None) -> str | None:
    """The chat template's source: the chosen file, else the checkpoint's, in the order the convention gives."""
    for path in [chosen] if chosen is not None else [folder / "chat_template.jinja"]:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            if chosen is not None:
                raise BadTokenizer("the manifest's chatTemplateFile does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BadTokenizer(f"{path.name} cannot be read") from error
    legacy = _json_object(folder / "chat_template.json").get("chat_template")
    stated = legacy if legacy is not None else config.get("chat_template")
    if isinstance(stated, str):
        return stated
    if isinstance(stated, list):
        by_name = {
            entry["name"]: entry["template"]
            for entry in stated
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
            if isinstance(entry.get("template"), str)
        }
        return by_name.get("default") or (next(iter(by_name.values())) if len(by_name) == 1 else None)
    return None


def _advised(config: Mapping[str, Any]) -> AdvisedSampling:
    """Sampling from a generation config; values outside what a request may ask for count as not given."""

    def number(name: str, low: float, high: float) -> float | None:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value) if low <= value <= high else None

    top_k = number("top_k", 0, 1_000_000)
    return AdvisedSampling(
        temperature=0.0 if config.get("do_sample") is False else number("temperature", 0, 2),
        top_p=number("top_p", 1e-9, 1),
        top_k=int(top_k) if top_k is not None else None,
        min_p=number("min_p", 0, 1),
        repetition_penalty=number("repetition_penalty", wire.MIN_REPETITION_PENALTY, wire.MAX_REPETITION_PENALTY),
    )
