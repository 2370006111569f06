"""The token -> bytes table of a checkpoint: the one thing about text that an engine knows.

`tokenizer.json` writes a vocabulary in one of two ways. Byte-level tokenizers spell each byte as a printable
character of their own. Those in the manner of SentencePiece write text as it is, with U+2581 for a space and
`<0xE2>` for a token that is one byte. In both, the added tokens are plain text. A table of any other kind is
refused: its tokens' bytes depend on their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from quire_engine.errors import NoVocabulary


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens` has an entry for each row of the model's logits; empty where no text belongs to the id."""

    tokens: list[bytes] = field(repr=False)
    special: Mapping[str, int]
    """Tokens that no text spells, by name: markers of turns and ends."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path, size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
        """The table of the checkpoint in `folder`, `size` long. Raises `NoVocabulary`."""
        try:
            described = msgspec.json.decode((folder / "tokenizer.json").read_bytes())
            byte_level = _is_byte_level(described.get("decoder") or {})
            entries = described["model"]["vocab"]
            named = entries.items() if isinstance(entries, dict) else ((e[0], i) for i, e in enumerate(entries))
            tokens = [b""] * size
            for token, index in named:
                if index < size:
                    tokens[index] = _spelled_bytes(token) if byte_level else _written_bytes(token)
            special: dict[str, int] = {}
            for added in described.get("added_tokens") or ():
                if added["id"] < size:
                    tokens[added["id"]] = added["content"].encode()
                    if added["special"]:
                        special[added["content"]] = added["id"]
        except FileNotFoundError:
            raise NoVocabulary("the checkpoint has no tokenizer.json") from None
        except (OSError, msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NoVocabulary(
                f"the checkpoint's tokenizer.json cannot be read: {type(error).__name__}"
            ) from error
        ends = tuple(index for index in eos_token_ids if index < size)
        if not ends:
            raise NoVocabulary("the checkpoint names no token that ends a text")
        return cls(tokens, special, ends)


def _is_byte_level(decoder: Mapping[str, Any]) -> bool:
    """Whether tokens spell bytes, rather than write text. Raises `NoVocabulary` where they do neither."""
    kinds = {part.get("type") for part in decoder.get("decoders", (decoder,))}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise NoVocabulary("the checkpoint's tokenizer is neither byte-level nor in the manner of SentencePiece")


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves; the others are numbered upwards from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _spelled_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _written_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
