"""What is sent, and where: the bytes of each request, made once before the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HOLE: Final = "{{question}}"
DEFAULT_TEMPLATE: Final = '{"query": "{{question}}"}'
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*)")
_RESERVED: Final = {"host", "content-length", "transfer-encoding", "connection"}
_PATH: Final = re.compile(r"/[\x21-\x7e]*")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a target listens.

    Raises:
        ValueError: the URL is none of http or https.
    """

    host: str
    port: int
    is_tls: bool
    authority: str
    base: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Return the address in *url*; what stands after the port is the base of every path."""
        try:
            parts = urlsplit(url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no port between 1 and 65535
            is_web = False
        if is_web and (parts.username is not None or parts.password is not None or parts.query or parts.fragment):
            # Not shown: what is wrong with it may be a secret.
            raise ValueError(
                "url must end after the path: give a password as --header 'Authorization: ...', a query with --path"
            )
        if not is_web or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"url must read http://HOST:PORT or https://HOST:PORT, not {url!r}")
        is_tls = parts.scheme == "https"
        assert parts.hostname is not None
        authority = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, authority, parts.path.rstrip("/"))


def read_template(text: str) -> Any:
    """Return the JSON in *text*, or in the file that `@NAME` names.

    Raises:
        ValueError: it is no JSON, or the file cannot be read.
    """
    where = "body"
    if text.startswith("@"):
        where = f"body: {text[1:]}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the body in {text[1:]}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"the body in {text[1:]} is not UTF-8 text") from None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def requests_of(
    address: Address, path: str, template: Any, questions: Sequence[str], headers: Mapping[str, str]
) -> list[bytes]:
    """Return one whole request for each question.

    Raises:
        ValueError: the path cannot stand in a request.
    """
    if not _PATH.fullmatch(path):
        raise ValueError(f"path must begin with / and hold no spaces, not {path!r}")
    lines = [f"POST {address.base}{path} HTTP/1.1", f"host: {address.authority}"]
    fields = {"content-type": "application/json", "accept": "application/json", **headers}
    lines += [f"{name}: {value}" for name, value in fields.items()]
    head = "\r\n".join(lines).encode("latin-1")
    bodies = [orjson.dumps(_filled(template, question)) for question in questions]
    return [b"%b\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body) for body in bodies]


def without_values(path: str) -> str:
    """Return *path* with the values of its query left out, since keys are given there, too."""
    plain, mark, query = path.partition("?")
    return plain + mark + "&".join(re.sub("=.*", "=...", pair) for pair in query.split("&"))


def read_headers(lines: Sequence[str], api_key: str | None) -> dict[str, str]:
    """Return the headers in *lines*, each `Name: value`, names in lower case.

    Raises:
        ValueError: one is no header, or one that the load tester writes itself.
    """
    headers = {}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable():
            raise ValueError("api-key must be printable ASCII")
        headers["authorization"] = f"Bearer {api_key}"
    for line in lines:
        matched = _HEADER.fullmatch(line)
        if matched is None:
            raise ValueError("header must read 'Name: value'; one of them, which may be a secret, does not")
        name = matched[1].lower()
        if name in _RESERVED:
            raise ValueError(f"header {name} is written by the load tester itself")
        headers[name] = matched[2].strip()
    return headers


def _filled(value: Any, question: str) -> Any:
    match value:
        case str():
            return value.replace(HOLE, question)
        case list():
            return [_filled(item, question) for item in value]
        case dict():
            return {name: _filled(item, question) for name, item in value.items()}
    return value
