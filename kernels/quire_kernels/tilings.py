"""Which tilings kernels were found fastest with on this machine, on disk: one file for each kernel and card.

    ~/.cache/quire/tilings/KERNEL-DIGEST.json        (XDG_CACHE_HOME)

    {"about": {"kernel", "source", "card", "capability", "multiprocessors", "shared", "torch", "triton"},
     "families": {"decode bfloat16 …": {"tiling": [64, 2, 3, 8], "us": 11.2, "default_us": 13.9, "tried": 5}}}

The digest is that of `about`, so another card, another Triton or a changed kernel is another file, and measured
anew. A family that is in the file is decided: an engine that starts later takes what it says, and replicas on
equal cards launch the same. `tried` 0: there was no time to measure it, and the default it is.

Who measures has the folder for himself (`cache.alone`); who writes reads first, and leaves what others wrote. A
file is replaced in one move. One that cannot be understood is told of by name and counts as none; what it says is
a wish, for only a tiling that the kernel itself proposes is ever launched (`tuning`). Beside it, while somebody
measures, lies KERNEL-DIGEST.attempts: a launch that ends the process does not end every one that follows.

No torch here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quire_kernels import cache

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 22
"""Of a file that is read: thousands of families."""
_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}\.json")

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
        digest = hashlib.sha256(json.dumps(dict(self.about), sort_keys=True).encode()).hexdigest()[:16]
        object.__setattr__(self, "path", folder() / f"{self.about['kernel']}-{digest}.json")

    def read(self) -> dict[str, Entry]:
        """What is decided. A file that cannot be understood is warned of, and counts as none."""
        try:
            return {name: _entry(given) for name, given in _content(self.path)["families"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("%s is not understood and left out: %s: %s", self.path, type(error).__name__, error)
            return {}

    def attempt(self) -> int:
        """Notes that somebody begins to measure; how many did, this one too, and did not come to `add`. Raises
        `OSError`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._attempts, "a+b") as file:
            file.write(b".")
            return file.tell()

    @property
    def _attempts(self) -> Path:
        return self.path.with_suffix(".attempts")

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Writes down what was decided, beside what is there; of one family the newer holds. Raises `OSError`."""
        merged = {**self.read(), **entries}
        content = {
            "about": dict(self.about),
            "families": {name: asdict(merged[name]) for name in sorted(merged)},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, made = tempfile.mkstemp(dir=self.path.parent, prefix=".")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file, indent=1)
            os.replace(made, self.path)
        except BaseException:
            os.unlink(made)
            raise
        self._attempts.unlink(missing_ok=True)


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
            path.with_suffix(".attempts").unlink(missing_ok=True)
            if left:
                Record(content["about"]).add({name: _entry(given) for name, given in left.items()})
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
