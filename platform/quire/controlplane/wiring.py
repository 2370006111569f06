"""What the operators cannot know of themselves and are handed: how an engine and the router are started, whether
the router could load a tokenizer, and what this machine has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from quire.router.config import RouterConfig
from quire.router.tls import TlsFiles
from quire.tracing import Declared
from quire_operators import devices
from quire_operators.devices import Inventory
from quire_operators.gateway import RouterCommand
from quire_operators.paths import StateDir
from quire_schemas.findings import TextFacts
from quire_schemas.gateway import is_loopback

DETECT_SECONDS = 1.0


def engine_argv(spec: Path) -> list[str]:
    """How an engine is started."""
    return [sys.executable, "-P", "-m", "quire_engine", str(spec), "--status-fd", "{status_fd}"]


def router_command(state: StateDir) -> RouterCommand:
    """How the router of this state directory is started."""

    def config(spec: Mapping[str, Any]) -> bytes:
        host, port, telemetry, tls = spec["bind"], spec["port"], spec.get("telemetry"), spec.get("tls")
        names = ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host)
        return msgspec.json.encode(
            RouterConfig(
                control_socket=str(state.router_control),
                snapshot_file=str(state.router_snapshot),
                store_folder=str(state.router_store),
                host=host,
                port=port,
                workers=spec["workers"],
                allowed_hosts=tuple(dict.fromkeys(names)),
                closed=not is_loopback(host),
                tls=TlsFiles(tls["certFile"], tls["keyFile"]) if tls else None,
                metrics_compat=spec["metrics"]["compat"],
                telemetry=_declared(telemetry) if telemetry else None,
            )
        )

    def argv(path: Path) -> list[str]:
        return [sys.executable, "-P", "-m", "quire.router", str(path), "--status-fd", "{status_fd}"]

    return RouterCommand(argv, config)


def _declared(telemetry: Mapping[str, Any]) -> Declared:
    return Declared(telemetry["otlpEndpoint"], telemetry["sampling"], telemetry["metrics"])


def text_facts(folder: Path, template: str | None) -> TextFacts | str:
    """What findings need to know of the tokenizer in `folder` with this chat template; why the router could not
    load it, if it could not.
    """
    from quire.text import Tokenizer  # with its templates it is a tenth of the start, and only models need it

    loaded = Tokenizer.attempt(folder, template)
    if isinstance(loaded, Tokenizer):
        advised = {name: value for name, value in asdict(loaded.advised).items() if value is not None}
        return TextFacts(loaded.vocab_size, loaded.template is not None, loaded.end, advised)
    cause = str(loaded.__cause__ or "").splitlines()
    return f"{loaded} ({cause[0][:200]})" if cause else str(loaded)


class Machine:
    """`devices.detect`, asked at most once a second: NVML takes its time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = float("-inf")
        self._inventory: Inventory | None = None

    def __call__(self) -> Inventory:
        now = self._clock()
        if self._inventory is None or now - self._at > DETECT_SECONDS:
            self._inventory, self._at = devices.detect(), now
        return self._inventory
