"""`python -m quire_engine SPEC.json [--status-fd N]`: one engine process. See `server` for how it ends."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from quire_engine.config import read_spec
from quire_engine.errors import InvalidSpec
from quire_engine.server import Server, Status


async def _run(path: Path, status: Status) -> int:
    try:
        spec = read_spec(path)
    except InvalidSpec as error:
        return status.failed(error)
    server = Server(spec, status)
    code = await server.run()
    if not server.stop_driver():
        # a thread inside a step or a read cannot be ended, and the interpreter must not be taken from under it
        if (tilings := sys.modules.get("quire_kernels.tilings")) is not None:  # else nothing is measured
            tilings.take_back()
        logging.shutdown()
        os._exit(code)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run an engine until it is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quire_engine", description="Serve one model on a Unix socket."
    )
    parser.add_argument("spec", type=Path, help="JSON file with an EngineSpec")
    parser.add_argument("--status-fd", type=int, metavar="N", help="open descriptor for status events, one a line")
    given = parser.parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_run(given.spec, Status(given.status_fd)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
