"""Whom a message goes to and whom it comes from: what we take for an email address, a phone number, a sender's name.

One reading for all: the gateway refuses by it what a provider could never send, and the provider of emails takes
addresses apart by it, so that nothing is accepted that cannot go out. Nobody is asked whether an address exists.

An email address is a local part in the plain form of RFC 5322, 3.2.3 (no quotes, no comments), letters of any alphabet
allowed (RFC 6531), and a domain by IDNA 2008 in its ASCII form. Names inside a network, `ann@mail`, are taken: a mail
server of one's own knows them. What is not printable is refused everywhere, and so no text ends a header or a command.

Errors never repeat what was given: they stand in logs and dead letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import idna

MAX_LOCAL_BYTES: Final = 64
MAX_ADDRESS_BYTES: Final = 254
"""RFC 5321, 4.5.3.1.1 and 4.5.3.1.3 (a path, less its brackets); counted as they go over the line, in UTF-8."""
MAX_NAME_CHARS: Final = 200
MAX_CHARS: Final = 320
"""Of an address with the name before it."""

_ATOM: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010ffff-]+"
_LOCAL: Final = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_LABEL: Final = r"(?!-)[A-Za-z0-9-]{0,62}[A-Za-z0-9]"
_HOST: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NAMED: Final = re.compile(r'(?:"(?P<quoted>(?:[^"\\]|\\["\\])*)"|(?P<plain>[^"<>]*)) *<(?P<address>[^<>]*)>')
_SPECIAL: Final = frozenset(",;:@\\")
"""What separates addresses, and so stands in quotes where it is part of a name."""

_NUMBER: Final = re.compile(r"\+[1-9][0-9]{6,14}")
_SHORT_CODE: Final = re.compile(r"[0-9]{3,8}")
_NAME: Final = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9 &._-]{1,11}")
_SERVICE: Final = re.compile(r"MG[0-9A-Fa-f]{32}")


class BadContact(ValueError):
    """Nothing can be sent to it, or by it; the message says why, to whoever gave it."""


@dataclass(frozen=True, slots=True, repr=False)
class Mailbox:
    """An email address, and the name before it.

    Attributes:
        name: "" where there is none.
        local: what stands before the `@`.
        domain: what stands behind it, in ASCII.
    """

    name: str
    local: str
    domain: str

    @property
    def address(self) -> str:
        """The address as it goes over the line."""
        return f"{self.local}@{self.domain}"


def read_mailbox(text: str, *, may_be_named: bool = True) -> Mailbox:
    """Read one email address: `ann@example.com`, and `Ann <ann@example.com>` where it may be named.

    Raises:
        BadContact: it is none, or more than one.
    """
    if len(text) > MAX_CHARS:
        raise BadContact(f"an email address with its name has {MAX_CHARS} characters at most")
    if not text.isprintable():
        raise BadContact("an email address holds no line break and no other character that cannot be printed")
    if "=?" in text:
        raise BadContact(
            "an email address and its name do not hold =?, which mail programs take for the start of a code"
        )
    if "<" not in text and ">" not in text:
        return _read_address("", text)
    found = _NAMED.fullmatch(text)
    if found is None:
        raise BadContact(
            'give one email address: ann@example.com, Ann <ann@example.com> or "Lee, Ann" <ann@example.com>'
        )
    if not may_be_named:
        raise BadContact("give the email address alone, like ann@example.com, without a name and without < >")
    plain = (found["plain"] or "").strip()
    if _SPECIAL.intersection(plain):
        raise BadContact('a name that holds , ; : @ or \\ stands in quotes: "Lee, Ann" <ann@example.com>')
    name = plain if found["quoted"] is None else re.sub(r"\\(.)", r"\1", found["quoted"]).strip()
    if len(name) > MAX_NAME_CHARS:
        raise BadContact(f"the name before an email address has {MAX_NAME_CHARS} characters at most")
    return _read_address(name, found["address"])


def _read_address(name: str, text: str) -> Mailbox:
    local, at, domain = text.rpartition("@")
    if not (at and local and domain):
        raise BadContact("give one email address, like ann@example.com")
    if '"' in local:
        raise BadContact("an email address with quotes before the @ is not taken")
    if " " in text or {",", ";", "@"}.intersection(local) or {",", ";"}.intersection(domain):
        raise BadContact("give one email address, without spaces")
    if not _LOCAL.fullmatch(local):
        raise BadContact("before the @ stand letters, digits, !#$%&'*+-/=?^_`{|}~ and single dots between them")
    box = Mailbox(name, local, _ascii(domain))
    if len(local.encode()) > MAX_LOCAL_BYTES:
        raise BadContact(f"before the @ of an email address stand {MAX_LOCAL_BYTES} bytes at most")
    if len(box.address.encode()) > MAX_ADDRESS_BYTES:
        raise BadContact(f"an email address has {MAX_ADDRESS_BYTES} bytes at most")
    return box


def _ascii(domain: str) -> str:
    """Return a domain in its ASCII form; one that is ASCII stays as it is."""
    try:
        text = domain if domain.isascii() else idna.encode(domain, uts46=True).decode()
    except UnicodeError:  # what IDNA refuses, and what its parts refuse
        text = ""
    if not _HOST.fullmatch(text):
        raise BadContact("what stands behind the @ of an email address is no domain")
    return text


def read_number(text: str) -> str:
    """Return a phone number as in E.164.

    Raises:
        BadContact: it is none.
    """
    if not _NUMBER.fullmatch(text):
        raise BadContact("a number as in E.164: + and the digits, country first, like +15005550006")
    return text


def read_sender(text: str) -> str:
    """Return who may send an sms or mms.

    Raises:
        BadContact: nobody is called so.
    """
    if not (_NUMBER.fullmatch(text) or _SHORT_CODE.fullmatch(text) or _NAME.fullmatch(text) or is_service(text)):
        raise BadContact(
            "a number as in E.164, a short code, a name of at most 11 characters, or a messaging service (MG and 32 "
            "hexadecimal digits)"
        )
    return text


def is_service(text: str) -> bool:
    """Say whether a sender is one of Twilio's messaging services."""
    return _SERVICE.fullmatch(text) is not None
