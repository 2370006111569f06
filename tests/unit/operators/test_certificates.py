"""Which TLS is spoken: a handshake in memory, with clients of each version."""

from __future__ import annotations

import ssl
import warnings
from pathlib import Path

import pytest
import trustme

from quire_operators import certificates


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """The version that both agree on. Raises `ssl.SSLError` where they do not."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(to_server, to_client, server_side=True)
    here = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for _ in range(6):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return there.version()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, trustme.CA]:
    folder: Path = tmp_path_factory.mktemp("pair")
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    leaf.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return certificates.read(str(folder / "cert.pem"), str(folder / "key.pem")), authority


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        (ssl.TLSVersion.TLSv1, None),
        (ssl.TLSVersion.TLSv1_1, None),
        (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ],
)
def test_tls_1_2_and_newer_are_spoken(
    pair: tuple[ssl.SSLContext, trustme.CA], version: ssl.TLSVersion, spoken: str | None
) -> None:
    server, authority = pair
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    client.set_ciphers("ALL:@SECLEVEL=0")  # a client that would take anything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version = client.maximum_version = version
    if spoken is None:
        with pytest.raises(ssl.SSLError):
            shake(server, client)
    else:
        assert shake(server, client) == spoken


def test_old_versions_are_refused_by_ourselves(pair: tuple[ssl.SSLContext, trustme.CA]) -> None:
    """Not by the configuration of the system's library."""
    assert pair[0].minimum_version is ssl.TLSVersion.TLSv1_2
