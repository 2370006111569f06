"""What the control plane writes for a router before it starts it: one JSON file, a `RouterConfig`.

The listening socket is not part of it: the shim binds it, keeps it, and hands it down as the descriptor whose
number is in the environment variable `LISTEN_FD`. Without that variable the router binds `host` and `port` itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

from quire.router.tls import TlsFiles
from quire.tracing import Declared

LISTEN_FD: Final = "QUIRE_LISTEN_FD"


class BadRouterConfig(Exception):
    """The configuration file is missing or does not say what a router needs."""


class RouterConfig(msgspec.Struct, frozen=True):
    """One router's fixed settings. Everything that changes while it runs comes in a `wire.RoutingTable`.

    A file of an earlier version may have fields that are no more: its router is started again by the version that
    is installed now.
    """

    control_socket: str
    """Unix socket on which the control plane speaks to this router; the folder exists and is 0700."""
    snapshot_file: str
    """The last accepted routing table, written atomically, loaded at start."""
    store_folder: str = ""
    """What clients have kept is in it; it is made when it is needed. "" is `router`, beside `snapshot_file`."""
    host: str = "127.0.0.1"
    port: int = 8000
    """Used only without an inherited descriptor. 0 takes any free port."""
    workers: int = 1
    """Processes that take connections from the socket; the one that is started starts the others."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names that a request's Host (any port) and Origin may carry, against web pages that rebind a name to us."""
    closed: bool = False
    """Other machines can reach it: nobody is let in without a key, whatever the routing table says."""
    shutdown_grace: float = 30.0
    """On SIGTERM, how long running requests may finish before they end in an error event."""
    tls: TlsFiles | None = None
    metrics_compat: Literal["none", "vllm"] = "none"
    """In which names besides ours `/metrics` speaks."""
    telemetry: Declared | None = None
    """What the gateway's manifest says about traces; without it OTEL_* decide."""

    @property
    def store(self) -> Path:
        """The folder that `store_folder` says."""
        return Path(self.store_folder) if self.store_folder else Path(self.snapshot_file).with_name("router")


def load(path: Path) -> RouterConfig:
    """The configuration in `path`. Raises `BadRouterConfig`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RouterConfig)
    except OSError as error:
        raise BadRouterConfig(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise BadRouterConfig(f"{path}: {error}") from error
