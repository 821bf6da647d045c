"""All that Redis holds at one instant, taken by one script, so that no two parts of it are from different moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pipeline.connection import Link
from pipeline.scripts import Script

V = TypeVar("V")

_TEXT: Final = """#!lua flags=no-writes
local answer = {}
for _, name in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', name).ok, {}
  if kind == 'string' then value = redis.call('GET', name)
  elseif kind == 'hash' then value = redis.call('HGETALL', name)
  elseif kind == 'set' then value = redis.call('SMEMBERS', name)
  elseif kind == 'list' then value = redis.call('LRANGE', name, 0, -1)
  elseif kind == 'zset' then value = redis.call('ZRANGE', name, 0, -1, 'WITHSCORES')
  elseif kind == 'stream' then
    local held = {}
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', name)) do
      for _, row in ipairs(redis.call('XPENDING', name, group[2], '-', '+', 1000)) do
        held[#held + 1] = {row[1], row[2], row[4]}
      end
    end
    value = {redis.call('XRANGE', name, '-', '+'), held}
  end
  answer[#answer + 1] = {name, kind, redis.call('PTTL', name), redis.call('DUMP', name), value}
end
return answer
"""
_SCRIPT: Final = Script("picture", _TEXT)


@dataclass(slots=True)
class Picture:
    """What stood in Redis, by key and type.

    Attributes:
        exact: every key to the last byte, as DUMP gives it, so that two moments can be compared; hashes and sets by
            their fields instead, since Redis dumps these in the order of a table that may just be growing.
        ttls: what is left of each key's life, in ms; -1: it has none.
        names: per stream, the names of all fields of all entries, in order.
        pending: per stream, the entries in somebody's hands: owner and delivery count.
    """

    exact: dict[str, object] = field(default_factory=dict)
    ttls: dict[str, int] = field(default_factory=dict)
    strings: dict[str, bytes] = field(default_factory=dict)
    hashes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    lists: dict[str, list[bytes]] = field(default_factory=dict)
    zsets: dict[str, dict[str, float]] = field(default_factory=dict)
    streams: dict[str, list[tuple[bytes, dict[str, bytes]]]] = field(default_factory=dict)
    names: dict[str, list[bytes]] = field(default_factory=dict)
    pending: dict[str, dict[bytes, tuple[str, int]]] = field(default_factory=dict)

    @staticmethod
    def under(prefix: str, values: Mapping[str, V]) -> dict[str, V]:
        """Return those of *values* whose key begins with *prefix*, by the rest of the key."""
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


async def take_picture(link: Link) -> Picture:
    """Return all that Redis holds now."""
    picture = Picture()
    for raw_name, kind, ttl_ms, dump, value in await link.run(_SCRIPT, (), ()):
        name = raw_name.decode()
        picture.ttls[name], picture.exact[name] = ttl_ms, dump
        match kind:
            case b"string":
                picture.strings[name] = value
            case b"hash":
                picture.exact[name] = picture.hashes[name] = {key.decode(): found for key, found in _pairs(value)}
            case b"set":
                picture.exact[name] = picture.sets[name] = {member.decode() for member in value}
            case b"list":
                picture.lists[name] = value
            case b"zset":
                picture.zsets[name] = {member.decode(): float(score) for member, score in _pairs(value)}
            case b"stream":
                entries, held = value
                picture.streams[name] = [
                    (entry, {key.decode(): found for key, found in _pairs(fields)}) for entry, fields in entries
                ]
                picture.names[name] = [found for _, fields in entries for found in fields[::2]]
                picture.pending[name] = {entry: (owner.decode(), count) for entry, owner, count in held}
            case _:
                raise AssertionError(f"{name} is a {kind.decode()}: nothing of ours is")
    return picture


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)
