"""The router's certificate, which is renewed in its files while connections come.

Each new connection is shown the pair of files that was read last; those that are open keep theirs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import Final

import msgspec

from quire_operators import certificates
from quire_operators.certificates import BadCertificate

log = logging.getLogger("quire.router")

LOOK_SECONDS: Final = 5.0
"""Between two looks at whether the files are new."""


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files of the certificate chain and its key."""

    cert_file: str
    key_file: str


class Certificate:
    """The pair of files as it was read last. Raises `BadCertificate` if it cannot be read at first."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamps()
        self._current = self._read()
        self.context = self._read()
        """The listener's."""
        self.context.sni_callback = self._show

    def _show(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _read(self) -> ssl.SSLContext:
        return certificates.read(self._files.cert_file, self._files.key_file)

    def _stamps(self) -> list[tuple[int, int]]:
        """When the files last changed, or who may read them did; empty while one is not there."""
        try:
            found = [os.stat(path) for path in (self._files.cert_file, self._files.key_file)]
        except OSError:
            return []
        return [(each.st_mtime_ns, each.st_ctime_ns) for each in found]

    async def renew(self) -> None:
        """Go on reading the files when they are new."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Read the files if they are new. What is no pair is left until it changes again."""
        if (now := self._stamps()) == self._seen:
            return
        self._seen = now
        try:
            self._current = self._read()
        except BadCertificate as problem:
            log.warning("the certificate stays the old one: %s", problem)
        else:
            log.info("new connections are shown the new certificate in %s", self._files.cert_file)
