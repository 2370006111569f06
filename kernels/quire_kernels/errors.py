"""What can go wrong with a back-end.

Exceptions:

    KernelError
    ├── UnknownBackend        `load` was asked for a name it does not have
    └── BackendUnavailable    this machine cannot run it; the message says why
"""

from __future__ import annotations


class KernelError(Exception):
    """A back-end cannot do what it was asked."""


class UnknownBackend(KernelError):
    """No back-end has this name."""


class BackendUnavailable(KernelError):
    """This machine cannot run the back-end."""
