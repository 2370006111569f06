"""Connections from this machine to the router's own port, for commands that try what they tell people to use."""

from __future__ import annotations

import http.client
import ssl
from urllib.parse import urlsplit


def connection(base_url: str, timeout: float, certificate: str | None = None) -> http.client.HTTPConnection:
    """A connection to the host and port of `base_url`; nothing is sent yet. `timeout` is seconds.

    By https the router has to show the certificate in the file `certificate`, or one that a certificate in there
    signed, whichever name it is for: the port is asked on this machine's own address. Raises OSError where the
    file cannot be used.
    """
    url = urlsplit(base_url)
    host = url.hostname or ""
    if url.scheme != "https":
        return http.client.HTTPConnection(host, url.port, timeout=timeout)
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return http.client.HTTPSConnection(host, url.port, timeout=timeout, context=context)
