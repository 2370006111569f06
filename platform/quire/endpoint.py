"""Whom to trust at a router, and connections for commands that try what they tell people to use."""

from __future__ import annotations

import http.client
import ssl
from urllib.parse import urlsplit


class NoCertificate(OSError):
    """What is to be trusted cannot be read: nobody was asked."""


def trust(base_url: str, certificate: str | None) -> ssl.SSLContext | None:
    """Whom a client of `base_url` trusts; None where that does not speak https.

    With the file `certificate` the server has to show what is in there, or what is signed by it, whichever name it
    is for: this machine's own router is asked by address. Without one the system's authorities vouch for the name.
    Raises `NoCertificate` where the file cannot be used.
    """
    if urlsplit(base_url).scheme != "https":
        return None
    try:
        context = ssl.create_default_context(cafile=certificate)
    except OSError as error:
        why = getattr(error, "reason", None) or error.strerror or error
        raise NoCertificate(f"{certificate}, the certFile of spec.tls, cannot be read: {why}") from error
    if certificate is not None:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def connection(base_url: str, timeout: float, certificate: str | None = None) -> http.client.HTTPConnection:
    """A connection to the host and port of `base_url`, by `trust`; nothing is sent yet. `timeout` is seconds."""
    url, context = urlsplit(base_url), trust(base_url, certificate)
    host = url.hostname or ""
    if context is None:
        return http.client.HTTPConnection(host, url.port, timeout=timeout)
    return http.client.HTTPSConnection(host, url.port, timeout=timeout, context=context)
