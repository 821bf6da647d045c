"""Certificates of loopback servers, made anew in each run."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """An authority that nobody else knows, and a server's certificate by it.

    Attributes:
        server: for servers called `localhost` or 127.0.0.1.
        wrong_name: for a server that is called otherwise.
        client: trusts this authority only.
        authority: its own certificate, as a file.
    """

    server: ssl.SSLContext
    wrong_name: ssl.SSLContext
    client: ssl.SSLContext
    authority: Path


def make(folder: Path) -> Certificates:
    """Make them."""
    authority = trustme.CA()
    client = ssl.create_default_context()
    authority.configure_trust(client)
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(path)
    contexts = []
    for name in ("localhost", "elsewhere.example"):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name, "127.0.0.1" if name == "localhost" else "192.0.2.1").configure_cert(context)
        contexts.append(context)
    return Certificates(contexts[0], contexts[1], client, path)
