"""Server-sent events out of bytes, however they are cut.

A line ends with CR, LF or both; an empty one ends an event. Of an event only its data is of interest here:
comments, names and ids are passed over. Bytes that end no line wait for what comes next.
"""

from __future__ import annotations


class Events:
    """Takes the bytes of one stream, in order."""

    __slots__ = ("_after_return", "_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_return = False
        """What came so far ends with CR; LF next belongs to it."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that `piece` completes, lines of one event joined by LF."""
        if self._after_return and piece:
            self._after_return = False
            if piece[0] == 10:
                piece = piece[1:]
        if not piece:
            return []
        lines = (self._rest + piece).splitlines() if self._rest else piece.splitlines()
        last = piece[-1]
        self._rest = b"" if last in (10, 13) else lines.pop()
        self._after_return = last == 13
        found = []
        for line in lines:
            if not line:
                if self._data:
                    found.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
        return found
