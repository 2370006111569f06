"""The text of one growing answer: ids in, out comes what its reader may see.

`Detokenizer` and `StopStrings` joined by the rules that the router and `quire.llm` share: below `min_tokens` no
stop string counts, and a token that ended the answer belongs to its text only where stop strings do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from quire.text.detokenizer import Detokenizer
from quire.text.stop import StopStrings
from quire.text.tokenizer import Tokenizer


class AnswerText:
    """`push` each token, then `finish`; once `hit` is set, nothing more comes out."""

    __slots__ = ("_has_stops", "_include_stop", "_min_tokens", "_stops", "_text", "_tokens", "made")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        visible: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._text = Detokenizer(tokenizer, skip_special_tokens, visible)
        self._stops = StopStrings(stops, include_stop)
        self._has_stops = bool(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self.made = 0
        """Characters so far, those that are held back for a stop string included."""

    @property
    def hit(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.hit

    def push(self, token: int) -> str:
        """The text that `token` lets out."""
        self._tokens += 1
        return self._through_stops(self._text.push_one(token))

    def finish(self, stop_token_id: int | None = None) -> str:
        """The rest of the text, when the answer ended, by `stop_token_id` or because it may have no more tokens.

        It may still end in a stop string: look at `hit`.
        """
        out = ""
        if stop_token_id is not None:
            if self._include_stop:
                out = self.push(stop_token_id)
            else:
                self._tokens += 1
        return out + self._through_stops(self._text.finish()) + self._stops.finish()

    def _through_stops(self, piece: str) -> str:
        self.made += len(piece)
        if not self._has_stops or self._tokens <= self._min_tokens:
            return piece  # there is none, or it is too early for one to count
        return self._stops.push(piece)[0]
