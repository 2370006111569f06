"""What is left of files when the power fails: writes as `disk_recorder.c` recorded them, cut off anywhere."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HEADER = struct.Struct("=4Q")
WRITE, SYNC, TRUNCATE, REMOVE = 1, 2, 3, 4
SECTOR = 512
"""Bytes that a disk writes whole or not at all."""


def recorder(folder: Path, files: Path) -> tuple[Path, dict[str, str]]:
    """Build the recorder in `folder`; its trace, and the environment that has a process record every file whose
    path begins with `files`."""
    library, trace = folder / "disk_recorder.so", folder / "trace"
    source = Path(__file__).with_name("disk_recorder.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environ = {"DISK_RECORDER_PREFIX": str(files), "DISK_RECORDER_TRACE": str(trace), "LD_PRELOAD": str(library)}
    return trace, environ


@dataclass(frozen=True, slots=True)
class Record:
    """One operation on a file; `end` is where its record ends in the trace."""

    operation: int
    path: str
    offset: int
    data: bytes
    end: int


def records(trace: bytes) -> Iterator[Record]:
    at = 0
    while at < len(trace):
        operation, offset, path, length = HEADER.unpack_from(trace, at)
        at += HEADER.size
        end = at + path + length
        yield Record(operation, trace[at : at + path].decode(), offset, trace[at + path : end], end)
        at = end


def whole_until(trace: bytes) -> int:
    """Where the last whole record ends: a process that was killed may have left a piece of one."""
    at = 0
    while len(trace) - at >= HEADER.size:
        _, _, path, length = HEADER.unpack_from(trace, at)
        if at + HEADER.size + path + length > len(trace):
            break
        at += HEADER.size + path + length
    return at


@dataclass
class File:
    """What is surely on the disk, and what was done since."""

    durable: bytearray | None = None
    pending: list[Record] = field(default_factory=list)

    def settle(self, count: int) -> None:
        """The first of what is pending is on the disk."""
        for each in self.pending[:count]:
            self.durable = _applied(self.durable, each)
        del self.pending[:count]


class Disk:
    """Files while their operations are played. A write is on the disk for sure once its file was synced after it;
    before that each of its sectors may be or not. That a file was removed is sure once its folder was synced."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}

    def play(self, record: Record) -> None:
        if record.operation == SYNC and record.path not in self.files:
            for path, file in self.files.items():
                if str(Path(path).parent) == record.path:
                    file.settle(
                        1 + max((n for n, each in enumerate(file.pending) if each.operation == REMOVE), default=-1)
                    )
            return
        file = self.files.setdefault(record.path, File())
        if record.operation == SYNC:
            file.settle(len(file.pending))
        else:
            file.pending.append(record)

    def after_power_cut(self, rng: random.Random) -> Mapping[str, bytes]:
        """The files that are found, by path."""
        found = {}
        for path, file in self.files.items():
            content = None if file.durable is None else bytearray(file.durable)
            for each in file.pending:
                content = _torn(content, each, rng)
            if content is not None:
                found[path] = bytes(content)
        return found


def _applied(content: bytearray | None, record: Record) -> bytearray | None:
    if record.operation == REMOVE:
        return None
    content = bytearray() if content is None else content
    if record.operation == TRUNCATE:
        del content[record.offset :]
        content.extend(bytes(record.offset - len(content)))
        return content
    end = record.offset + len(record.data)
    content.extend(bytes(max(end - len(content), 0)))
    content[record.offset : end] = record.data
    return content


def _torn(content: bytearray | None, record: Record, rng: random.Random) -> bytearray | None:
    """A record of which some sectors reached the disk, in no order."""
    if record.operation != WRITE:
        return _applied(content, record) if rng.random() < 0.5 else content
    kept = rng.choice((0.0, 0.5, 0.5, 1.0))
    at = 0
    while at < len(record.data):
        end = min((record.offset + at) // SECTOR * SECTOR + SECTOR - record.offset, len(record.data))
        if rng.random() < kept:
            piece = Record(WRITE, record.path, record.offset + at, record.data[at:end], record.end)
            content = _applied(content, piece)
        at = end
    return content
