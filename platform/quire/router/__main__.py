"""`python -m quire.router CONFIG.json [--status-fd N]`: run a router until SIGTERM, or until it is told to finish.

The line {"event": "ready"} goes to the descriptor N when requests are answered, by all workers if they come up:
its shim waits longer each time with a router that does not get there.

With several workers this process is their head, which starts the others (`crew`) by the same command and
`--worker NUMBER --line-fd N` (`worker`), and ends when they have.

A worker is started from what is installed at that moment. Where that is not what its head was started from, it
ends at once: the two would not understand each other.

Exit codes: 0 after SIGTERM, SIGINT or `wire.Finish`, 78 when the configuration is wrong (starting again is
pointless), 76 of a worker that is not of its head's version, 1 otherwise, also while the files of the certificate
are no pair.
"""

# ruff: noqa: E402 - the search for garbage is off while modules are imported
from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

gc.disable()  # nothing of what is imported is garbage, and the search for it takes a tenth of the start

from quire.doors import raise_limit
from quire.router import config as configuration
from quire.router.access import Access
from quire.router.app import build
from quire.router.control import ControlServer
from quire.router.crew import Crew
from quire.router.fleet import Fleet
from quire.router.line import version
from quire.router.server import (
    Board,
    Server,
    base_url,
    deaf,
    heed,
    listening_socket,
    options,
    prepare,
    until_told,
)
from quire.router.telling import Teller
from quire.router.tls import Certificate
from quire.router.worker import work
from quire.tracing import BadTelemetry
from quire_operators.certificates import BadCertificate

log = logging.getLogger("quire.router")
EX_CONFIG = 78
COMPLETE_SECONDS = 15.0
"""That the others of several workers are waited for before the router says that it is ready: one that takes the
place of another has its work from then on."""


async def serve(
    config: configuration.RouterConfig,
    listening: socket.socket,
    teller: Teller,
    status_fd: int | None,
    command: Sequence[str],
) -> None:
    """Serve on `listening` until a signal, then let running requests finish within the grace. Other workers are
    started by `command`, and what tells them who they are. Raises `BadTelemetry` and `BadCertificate`."""
    listening = door = prepare(listening, plain=config.tls is None)
    board = Board.new() if config.workers > 1 or config.tls is not None else None
    fleet = Fleet(Path(config.snapshot_file), Access(config.closed))
    head = build(fleet, config, teller, lambda: crew.scrape())
    await fleet.load_snapshot()
    fleet.metrics.watch_room(lambda: door.refused, lambda: fleet.memory.share)
    certificate = None if config.tls is None else Certificate(config.tls)
    spoken = version()  # now: later another one may be installed
    crew = Crew(
        config.workers - 1,
        lambda index, line, board: [
            *command,
            "--worker",
            str(index),
            "--line-fd",
            str(line),
            "--board-fd",
            str(board),
            "--speaks",
            spoken,
        ],
        listening,
        board,
        fleet,
        head,
    )

    async def tell() -> None:
        await serving.wait()
        await crew.complete(COMPLETE_SECONDS)
        if status_fd is not None:
            os.write(status_fd, b'{"event": "ready"}\n')

    def begins_to_end(grace: float) -> None:
        control.leave()
        head.executor.drain()
        crew.finish(grace)

    await teller.begun()
    serving = asyncio.Event()
    telling = asyncio.create_task(tell(), name="ready")
    settings = options(head.asgi, fleet, certificate)
    server = Server(settings, config.shutdown_grace, serving.set, begins_to_end, board)
    heed(server)  # before anybody can know that it is there, and end it
    crew.own_requests = lambda: server.requests
    url = base_url(listening, "http" if config.tls is None else "https")
    control = ControlServer(crew, Path(config.control_socket), url, server.finish, head.usage.report)
    await control.open()
    log.info("router on %s, control on %s", url, config.control_socket)
    head.executor.start()
    head.examiner.start()
    crew.start()
    try:
        await until_told(server, listening, certificate, fleet.memory)
    finally:
        telling.cancel()
        await crew.close()
        await control.close()
        await head.executor.close()
        await head.examiner.close()
        await fleet.close()
        deaf()


def main(arguments: list[str]) -> int:
    """Run with the configuration file named in `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m quire.router", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--status-fd", type=int, metavar="N", help="open descriptor for the line that says ready")
    parser.add_argument("--worker", type=int, metavar="NUMBER", help="be this worker of another process's router")
    parser.add_argument("--line-fd", type=int, metavar="N", help="its end of the line to that process")
    parser.add_argument("--board-fd", type=int, metavar="N", help="the board of that router's workers")
    parser.add_argument("--speaks", metavar="VERSION", help="what that process speaks")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:
        return EX_CONFIG if end.code else 0
    name = "" if given.worker is None else f"worker {given.worker}"
    who = f" {name}:" if name else ""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s %(name)s:{who} %(message)s", stream=sys.stderr
    )
    if given.worker is not None and given.speaks != version():
        sys.stderr.write(
            f"error: this router runs {given.speaks}, and what is installed now is {version()}\n"
            "    hint: replace the gateway to run what is installed\n"
        )
        return os.EX_PROTOCOL
    # Each text is tokenized on the thread that asks: in the library's own pool a short one waits behind long ones.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        config = configuration.load(given.config)
    except configuration.BadRouterConfig as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG
    raise_limit()
    try:
        listening = listening_socket(config)
    except OSError as error:
        sys.stderr.write(
            f"error: cannot listen on {config.host}:{config.port}: {error.strerror}\n"
            "    hint: another process has the port; choose one in the Gateway's spec.port\n"
        )
        return 1
    interpreter = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]]
    teller = Teller.of(config.telemetry, who=name, command=[*interpreter[:-1], "quire.teller"])
    try:
        if given.worker is not None:
            line, board = socket.socket(fileno=given.line_fd), Board(given.board_fd, given.worker)
            asyncio.run(teller.during(work(config, listening, line, board, teller)))
            return 0
        command = [*interpreter, str(given.config)]
        asyncio.run(teller.during(serve(config, listening, teller, given.status_fd, command)))
    except BadTelemetry as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG
    except BadCertificate as error:  # not EX_CONFIG: the files may be mended, and then another try does
        sys.stderr.write(f"error: {error}\n    hint: they are named in the Gateway's spec.tls\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
