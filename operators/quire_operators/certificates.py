"""A certificate and its key from files: read by the control plane before it accepts them, and by the router.

Exceptions:

    BadCertificate         the files are not there, or no pair
"""

from __future__ import annotations

import ssl


class BadCertificate(Exception):
    """The files are not there, or no pair. Somebody may be about to mend that."""


def read(cert_file: str, key_file: str) -> ssl.SSLContext:
    """A server's context with the chain and the key in these PEM files. Raises `BadCertificate`.

    Each has one of its own: a context that is given a second pair keeps the first for keys of another kind.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (cert_file, key_file):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise BadCertificate(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        context.load_cert_chain(cert_file, key_file, password=_nobody)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise BadCertificate(f"{cert_file} with the key {key_file} cannot be used: {why}") from error
    return context


def _nobody() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")
