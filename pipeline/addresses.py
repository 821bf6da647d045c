"""Which addresses we call on a stranger's behalf: a plain decision on the text of a URL, and on an IP address.

A URL that a client gives us is called from inside our network, so it must not lead there ("server-side request
forgery"). Two looks, and both must hold:

1. `read_url` takes a small language in which all readers of URLs agree: scheme, a host in one of three plain forms, a
   port, a path. What some reader might take for another address (`127.1`, `0x7f000001`, `user@host`, `host%00`,
   full-width digits, a backslash) is refused by its form, before anybody asks what it means.
2. `is_public` judges each address that a host's name leads to, when it is called; the connection is made to the address
   that was judged, so a resolver that answers otherwise the second time is never asked a second time.

IPv4 is judged by what is not public, IPv6 by what is: of its space only an eighth was ever given out, and every
form that carries an IPv4 address inside (mapped, NAT64, 6to4, Teredo) lies outside of it or is taken out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

MAX_CHARS: Final = 2_048

_URL = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>(?:[/?][!$-;=?-\[\]_a-z~]*)?)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")

_INSIDE: Final = frozenset({"localhost", "localdomain", "local", "internal", "intranet", "lan", "corp", "home", "arpa"})
"""Last labels of names that mean something inside a network only (RFC 6761, 6762, 8375, ICANN's "internal")."""

_BAD_PORTS: Final = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080}
)
"""Above 1023 and yet another protocol's: the "bad ports" of the Fetch standard, which no browser calls either."""

_NOT_PUBLIC_V4: Final = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # looks public, and is the inside of every machine at Azure
    )
)  # fmt: skip
"""IANA's special-purpose registry and multicast, whether or not they are forwarded somewhere."""

_PUBLIC_V6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_V6: Final = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",
    )
)


class BadUrl(ValueError):
    """The URL is not one that we call; the message says why, to whoever gave it."""


@dataclass(frozen=True, slots=True)
class Url:
    """A URL that may be called, as far as its text tells.

    Attributes:
        text: as it was given, but for a scheme in capitals.
        host: a name, or an IP address without brackets.
        port: 80 or 443 where none is written.
    """

    text: str
    scheme: str
    host: str
    port: int


def read_url(text: str, *, allow_private: bool = False) -> Url:
    """Read a URL that a client wants us to call; nobody is asked what its host's name means.

    Args:
        allow_private: take any address and any port, for development.

    Raises:
        BadUrl: it is none that we call.
    """
    if len(text) > MAX_CHARS:
        raise BadUrl(f"a URL has {MAX_CHARS} characters at most")
    if not text.isascii():
        raise BadUrl("a URL is ASCII: write its host as IDNA does (xn--...), its path percent-encoded")
    if "#" in text:
        raise BadUrl("a URL to be called has no fragment (`#`)")
    found = _URL.fullmatch(text)
    if found is None:
        if "@" in re.split(r"[/?]", text.partition("//")[2], maxsplit=1)[0]:
            raise BadUrl("a URL must not hold a user or a password")
        raise BadUrl("give an absolute http:// or https:// URL, e.g. https://example.com/hook")
    scheme = found["scheme"].lower()
    port = int(found["port"]) if found["port"] else {"http": 80, "https": 443}[scheme]
    if not 0 < port < 65_536:
        raise BadUrl("a port is a number from 1 to 65535")
    if not allow_private and (port in _BAD_PORTS or (port < 1_024 and port not in {80, 443})):
        raise BadUrl(f"port {port} belongs to another protocol: use 80, 443, or one above 1023")
    host = _read_v6(found["v6"]) if found["v6"] else _read_host(found["host"], allow_private=allow_private)
    if not allow_private and (address := _address(host)) is not None and not is_public(address):
        raise BadUrl(f"{host} is not a public address")
    return Url(scheme + text[len(scheme) :], scheme, host, port)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Say whether an address is one that anybody on the Internet may call."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address.scope_id is not None:
        return False
    return address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def is_loopback(host: str) -> bool:
    """Say whether a host, as settings name one, is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_v6(text: str) -> str:
    try:
        return str(IPv6Address(text))
    except ValueError:
        raise BadUrl(f"[{text}] is no IPv6 address") from None


def _read_host(host: str, *, allow_private: bool) -> str:
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1] or labels[-2 % len(labels)]):
        # Readers take such a host for an IPv4 address, in more spellings than one; only the plain one is taken here.
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise BadUrl(f"{host}: write an IPv4 address as four decimal numbers, e.g. 192.0.2.1") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadUrl(f"{host[:100]} is no host's name (a dot at its end is not taken either)")
    if not allow_private and (len(labels) == 1 or labels[-1].lower() in _INSIDE):
        raise BadUrl(f"{host} is a name inside a network; a receiver has a public one")
    return host.lower()


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
