"""What can go wrong in an engine, as one tree.

    EngineError
    ├── StartError            this spec cannot give an engine on this machine; trying again is pointless
    │   ├── InvalidSpec       the spec itself: a bound, a path, a folder that others may enter
    │   ├── NotInvariant      answers would depend on what else runs, and the spec forbids that
    │   └── MemoryMismatch    real bytes differ from the sizing arithmetic, or lie above the limit
    ├── DeviceUnavailable     the device of the spec is not there, or does not compute
    ├── OutOfMemory           memory that the arithmetic counts on could not be had; another time it may be there
    ├── SocketTaken           another process answers on the socket; it may be about to end
    ├── RequestRefused        one request cannot be served; it never reaches the queue
    ├── NoVocabulary          the checkpoint's tokens have no bytes of their own: no structured output
    ├── GrammarFailed         a request's constraint allows no next token, or costs too much to go on with
    ├── InvariantBroken       blocks or counters do not add up: the engine cannot be trusted and stops
    └── DeviceLost            the accelerator's context is gone; only a new process brings it back

A request's own failure during a step is not an exception that travels: it becomes the request's last delta.
"""

from __future__ import annotations

import sys
from typing import Any


class EngineError(Exception):
    """Root of everything this package raises on purpose."""


class StartError(EngineError):
    """This spec cannot give an engine on this machine. `reason` is a CamelCase word for a status condition."""

    reason = "StartFailed"


class InvalidSpec(StartError):
    """The spec names something impossible."""

    reason = "InvalidSpec"


class NotInvariant(StartError):
    """The numbers of a sequence depend on what else is in its steps, and the spec forbids that."""

    reason = "NotDeterministic"


class MemoryMismatch(StartError):
    """Weights or KV tensors are not the size that was planned, or together lie above the limit."""

    reason = "MemoryMismatch"


class DeviceUnavailable(EngineError):
    """The device of the spec is not there, or does not compute. It may come back."""


class OutOfMemory(EngineError):
    """Planned memory could not be had at load. The message has the arithmetic and a hint."""


class SocketTaken(EngineError):
    """Another process listens on the socket of the spec."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of a device, could not be had: another time it may be there."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    torch: Any = sys.modules.get("torch")  # not imported here: without it loaded, the error is none of its own
    if torch is None:
        return False
    # torch reports the machine's own memory as a plain RuntimeError of its allocator
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class RequestRefused(EngineError):
    """One request cannot be served. `code` is a word of the error contract, `param` the name in `BeamSearch` or
    `Pooling` of the part that is at fault, if one is.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class NoVocabulary(EngineError):
    """The checkpoint has no table of tokens and their bytes, or none that can be read."""


class GrammarFailed(EngineError):
    """One request's constraint cannot be followed any further."""


class InvariantBroken(EngineError):
    """The engine's own bookkeeping contradicts itself."""


class DeviceLost(EngineError):
    """The accelerator reported an error that outlives the step in which it happened."""
