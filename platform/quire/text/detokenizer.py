"""Ids to text while they come, so that the pieces together are exactly the text of all ids.

Two kinds of vocabularies need two ways:

- **byte-level BPE**: each token is a fixed run of bytes. The bytes go through an incremental UTF-8 decoder, which
  keeps the beginning of an unfinished character to itself and is told at the end to give up on it.
- **all others** (SentencePiece style): the text of a token depends on its neighbours (the first one loses its
  space), and a run of byte-fallback tokens decodes as a whole: one wrong byte makes each of them U+FFFD. So a
  short window of ids is decoded with and without the new ones, the difference is the new text, and a run of byte
  tokens is kept back until a token of another kind ends it.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from quire.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence. `push` gives what became certain, `finish` the rest."""

    __slots__ = ("_bytes", "_done", "_hidden", "_window", "tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, visible: Collection[int] = ()
    ) -> None:
        """`visible` are special tokens that have their text whatever `skip_special_tokens` says."""
        self.tokenizer = tokenizer
        self._hidden = tokenizer.special_ids.difference(visible) if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._window: list[int] = []
        """Ids whose text may still matter; the first `_done` of them have been given out."""
        self._done = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` make certain; never part of a character."""
        return "".join([self.push_one(index) for index in ids])

    def push_one(self, index: int) -> str:
        """The same for one id."""
        if index in self._hidden:
            return ""
        if self._bytes is not None:
            return self._bytes.decode(self.tokenizer.token_bytes(index))
        if not self.tokenizer.knows(index):
            return ""  # the decoding of the whole leaves these out before it looks at neighbours
        self._window.append(index)
        return "" if index in self.tokenizer.byte_tokens else self._advance()

    def finish(self) -> str:
        """What was kept back. An unfinished character becomes U+FFFD, as in the decoding of the whole."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        return self._advance()

    def _advance(self) -> str:
        before = self._text(self._window[: self._done])
        after = self._text(self._window)
        # The decoder strips from the first text it sees: a window must not begin with tokens that have none.
        if self._text(self._window[self._done :]):
            self._window = self._window[self._done :]
        self._done = len(self._window)
        return after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
