"""`Idempotency-Key`: the same request sent twice does its work once.

A key belongs to one tenant and one path and is remembered for a day. The same body waits for, or repeats, the first
answer; another body is refused. Bodies are compared as JSON values, so spacing and the order of fields do not matter.
The record itself is written by the script that accepts the job, so there is no instant in which a job is accepted
and its key is not; a refusal accepts nothing and so is not kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final

import orjson
from pydantic import StringConstraints, TypeAdapter, ValidationError

from gateway.errors import Problem
from pipeline.accepting import Idempotency
from pipeline.job import Json

HEADER: Final = b"idempotency-key"
TTL_S: Final = 86_400.0
MAX_CHARS: Final = 255
Key = Annotated[str, StringConstraints(pattern=rf"^[\x21-\x7e]{{1,{MAX_CHARS}}}$")]

_KEY: Final = TypeAdapter(Key)


def read_key(headers: Mapping[bytes, bytes], tenant: str, path: str, body: Json) -> Idempotency | None:
    """Return what the accepting script needs to know, None where the request carries no key.

    Raises:
        Problem: 422, the key is empty, too long, or not printable ASCII.
    """
    sent = headers.get(HEADER)
    if sent is None:
        return None
    try:
        _KEY.validate_python(sent.decode("latin-1"))
    except ValidationError:
        message = f"an Idempotency-Key is 1 to {MAX_CHARS} printable ASCII characters without spaces"
        raise Problem(422, "invalid_idempotency_key", message, param="Idempotency-Key") from None
    scope = hashlib.sha256(b"\n".join((tenant.encode(), path.encode(), sent)))  # no part can hold a line break
    value = hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
    return Idempotency(key=scope.hexdigest(), body_hash=value.hexdigest(), ttl_s=TTL_S)
