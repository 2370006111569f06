"""Stop strings over text that comes in pieces: no part of one ever gets out.

What may be the beginning of a stop string is kept back: the longest end of the text seen that begins one of them.
The match is the one that is complete first, read character by character (of two complete at once, the longer), so
that how the text was cut into pieces makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for `stops`, each at least one character; with `include` the one found stays at the text's end."""

    __slots__ = ("_held", "_include", "_prefixes", "_stops", "hit")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit: str | None = None
        longest = max((len(stop) for stop in stops), default=1)
        self._prefixes = tuple(
            tuple({stop[:size] for stop in stops if len(stop) > size}) for size in range(1, longest)
        )

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may go out, and the stop string that was hit. After a hit, nothing more goes out."""
        if self.hit is not None:
            return "", self.hit
        if not self._stops:
            return text, None
        seen = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if found:
            end, start, self.hit = min(found)
            self._held = ""
            return seen[: end if self._include else start], self.hit
        keep = 0
        for size in range(min(len(seen), len(self._prefixes)), 0, -1):
            if seen.endswith(self._prefixes[size - 1]):
                keep = size
                break
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep], None

    def release(self) -> str:
        """Give up what is kept back: the text ended, or it is too early for a stop string to count."""
        held, self._held = self._held, ""
        return held

    def finish(self) -> str:
        """The rest of the text when it ended without a hit."""
        return "" if self.hit is not None else self.release()
