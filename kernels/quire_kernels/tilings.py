"""Which tilings kernels were found fastest with on this machine, on disk: one file for each kernel and card.

    ~/.cache/quire/tilings/KERNEL-DIGEST.json        (XDG_CACHE_HOME)

    {"about": {"kernel", "source", "card", "capability", "multiprocessors", "shared", "torch", "triton"},
     "families": {"decode bfloat16 …": {"tiling": [64, 2, 3, 8], "us": 11.2, "default_us": 13.9, "tried": 5}}}

The digest is that of `about`, so another card, another Triton or a changed kernel is another file, and measured
anew. A family that is in the file is decided: an engine that starts later takes what it says, and replicas on
equal cards launch the same. `tried` 0: it was decided unmeasured, for the default (`tuning` says when).

Who measures has the card for himself (`Record.alone`); who writes has the folder, for a moment, reads first, and
leaves what others decided meanwhile: the first decision holds. A file is replaced in one move. One that cannot be
understood is told of by name and counts as none; what it says is a wish, for only a tiling that the kernel itself
proposes is ever launched (`tuning`).

Beside it, while somebody measures, lies KERNEL-DIGEST.attempts: {family: how often}. A launch that ends the
process leaves its family there, and does not end every process that follows. Beside the folder there is an empty
one for each kind of card, tilings.locks/DIGEST, which is what `Record.alone` locks.

No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quire_kernels import cache

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 22
"""Of a file that is read: thousands of families."""
_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}\.json")
_ATTEMPTS = re.compile(r"[a-z]+-[0-9a-f]{16}\.attempts")
_WRITING_SECONDS = 10.0
"""That somebody waits who writes: others are done in milliseconds."""

Spelled = int | None | list["Spelled"]
"""A tiling as JSON has it."""


@dataclass(slots=True, frozen=True)
class Entry:
    """What was decided of one family."""

    tiling: Spelled
    us: float
    """Of one launch; 0 where nothing was measured."""
    default_us: float
    tried: int
    """Candidates that were measured."""


@dataclass(slots=True, frozen=True)
class Record:
    """The file of one kernel on one machine."""

    about: Mapping[str, str | int]
    """What a measurement holds for; `kernel` is in it."""
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", folder() / f"{self.about['kernel']}-{_digest(self.about)}.json")

    def alone(self, seconds: float) -> contextlib.AbstractContextManager[bool]:
        """Who measures on such a card waits here for others who do: see `cache.alone`."""
        card = {key: value for key, value in self.about.items() if key not in ("kernel", "source")}
        return cache.alone(cache.folder("tilings.locks") / _digest(card), seconds)

    def read(self) -> dict[str, Entry]:
        """What is decided. A file that cannot be understood is warned of, and counts as none."""
        try:
            return {name: _entry(given) for name, given in _content(self.path)["families"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("%s is not understood and left out: %s: %s", self.path, type(error).__name__, error)
            return {}

    def attempts(self) -> dict[str, int]:
        """How often each family was begun with by a process that died of it, or of something else meanwhile."""
        try:
            found = json.loads(self._attempts.read_text())
            return {name: count for name, count in found.items() if isinstance(count, int)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            log.warning("%s is not understood and left out: %s: %s", self._attempts, type(error).__name__, error)
            return {}

    def attempt(self, names: Collection[str]) -> None:
        """Notes that these families are launched now, until `attempted`. Raises `OSError`."""
        with _noting:
            if not _ends:
                self._note(names, 1)
                _begun.append((self, names))

    def attempted(self, names: Collection[str], *, ended: bool) -> None:
        """They are no more; `ended`: that was the end of what the process could do. Raises `OSError`."""
        with _noting:
            if (self, names) in _begun:
                _begun.remove((self, names))
                if not ended:
                    self._note(names, -1)

    def _note(self, names: Collection[str], more: int) -> None:
        with _writing():
            found = self.attempts()
            self._keep_attempts(found | {name: found.get(name, 0) + more for name in names})

    def _keep_attempts(self, found: Mapping[str, int]) -> None:
        if left := {name: count for name, count in found.items() if count > 0}:
            _replace(self._attempts, left)
        else:
            self._attempts.unlink(missing_ok=True)

    @property
    def _attempts(self) -> Path:
        return self.path.with_suffix(".attempts")

    def add(self, entries: Mapping[str, Entry], was: Mapping[str, Entry] | None = None) -> None:
        """Writes down what was decided, beside what is there; where something else is there by now than what
        `was`, this stays. Raises `OSError`."""
        with _writing():
            there, was = self.read(), was or {}
            mine = {name: entry for name, entry in entries.items() if there.get(name) == was.get(name)}
            self._write(there | mine)
            found = self.attempts()
            self._keep_attempts({name: count for name, count in found.items() if name not in entries})

    def _write(self, entries: Mapping[str, Entry]) -> None:
        families = {name: asdict(entries[name]) for name in sorted(entries)}
        _replace(self.path, {"about": dict(self.about), "families": families})


_noting = threading.RLock()
_begun: list[tuple[Record, Collection[str]]] = []
"""What this process launches now."""
_ends = False


def take_back() -> None:
    """For a process that ends because somebody wants it to, whatever its threads do: it does not die of what it
    measures. It notes nothing more."""
    global _ends
    with _noting:
        _ends = True
        for record, names in list(_begun):
            with contextlib.suppress(OSError):  # then it counts as a death, of which it takes two
                record.attempted(names, ended=False)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Nobody else writes. Raises `OSError`."""
    folder().mkdir(parents=True, exist_ok=True)
    with cache.alone(folder(), _WRITING_SECONDS) as mine:
        if not mine:
            raise OSError(errno.ENOLCK, "it cannot be locked")
        yield


def _replace(path: Path, content: Any) -> None:
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(made, path)
    except BaseException:
        os.unlink(made)
        raise


def _digest(about: Mapping[str, str | int]) -> str:
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:16]


def folder() -> Path:
    """Where the files are. Raises `KernelError` where nobody knows a home."""
    return cache.folder("tilings")


def kept() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that there are, and what is in each; those that are not understood are warned of."""
    place = folder()
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                yield path, _content(path)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                log.warning("%s is not understood: %s: %s", path, type(error).__name__, error)
                yield path, {}


def clear(*, unmeasured: bool = False) -> int:
    """Forgets all families, or those that there was no time to measure; how many. Engines that run keep what they
    have, those that start measure anew. Raises `OSError`."""
    gone = 0
    with cache.alone(folder()):
        for path, content in kept():
            families = content.get("families", {})
            left = {name: given for name, given in families.items() if unmeasured and given.get("tried") != 0}
            gone += len(families) - len(left)
            path.unlink(missing_ok=True)
            if left:
                Record(content["about"])._write({name: _entry(given) for name, given in left.items()})
        for path in sorted(folder().iterdir()) if folder().is_dir() else ():
            if _ATTEMPTS.fullmatch(path.name):
                path.unlink(missing_ok=True)
    return gone


def _content(path: Path) -> dict[str, Any]:
    """Raises what a file of any content can lead to."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content["families"], dict):
        raise ValueError("it has no families")
    if not isinstance(content["about"], dict) or "kernel" not in content["about"]:
        raise ValueError("it does not say what it is about")
    if Record(content["about"]).path.name != path.name:
        raise ValueError("it is about something else")
    for given in content["families"].values():
        _entry(given)
    return content


def _entry(given: Any) -> Entry:
    """Raises ValueError, TypeError."""
    entry = Entry(**given)
    numbers = (entry.us, entry.default_us, entry.tried)
    if not all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("a time is no number")
    return entry
