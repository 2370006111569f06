"""Runs fetch after fetch in one process, so that a test of many pays for the start of one: a job a line in, the
events of each out."""

from __future__ import annotations

import sys

import msgspec

from quire_operators.fetch import Fetch, FetchFailed
from quire_schemas.hub import FetchEvent, FetchJob


def say(event: FetchEvent) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


for line in sys.stdin.buffer:
    try:
        say(FetchEvent("done", commit=Fetch(msgspec.json.decode(line, type=FetchJob), say).run()))
    except FetchFailed as failed:
        say(FetchEvent("failed", reason=failed.reason, message=failed.message, hint=failed.hint, path=failed.path))
