"""Log lines: structlog on standard output, JSON unless a person is watching.

Every process calls `configure` once, in its `__main__`; everybody else says `structlog.get_logger()`. Lines of other
libraries (uvicorn, asyncio, redis) come out in the same form. Lines about a job carry `job_id`, `stage`, `worker` and
`attempt`; prompts and answers never stand in a line at info or above.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from pipeline.settings import LogSettings

_DIM, _YELLOW, _RED, _OFF = "\x1b[2m", "\x1b[33m", "\x1b[31m", "\x1b[0m"
_COLOURS: Final = {"warning": _YELLOW, "error": _RED, "critical": _RED}
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(settings: LogSettings, process: str, stream: TextIO | None = None) -> None:
    """Set up logging for this process.

    Args:
        process: who speaks, e.g. `gateway`, `encoder`; stands in every line.
        stream: standard output when None.
    """
    out = sys.stdout if stream is None else stream
    console = settings.format == "console" or (settings.format == "auto" and out.isatty())
    level = _LEVELS[settings.level]

    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_process,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    render = render_for_people if console else _render_json
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    first = {name: event.pop(name) for name in ("timestamp", "level", "process", "event") if name in event}
    return orjson.dumps({**first, **event}, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()


def render_for_people(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Return one short line: time, process, what happened, `name=value` pairs; a traceback follows on its own lines."""
    time = str(event.pop("timestamp", ""))[11:19]
    colour = _COLOURS.get(str(event.pop("level", "info")), "")
    process, text, trace = event.pop("process", ""), event.pop("event", ""), event.pop("exception", None)
    pairs = " ".join(f"{name}={_value(value)}" for name, value in event.items())
    line = f"{_DIM}{time} {process:<9}{_OFF} {colour}{text}{_OFF if colour else ''}"
    return line + (f"  {_DIM}{pairs}{_OFF}" if pairs else "") + (f"\n{trace}" if trace else "")


def _value(value: Any) -> str:
    text = str(value)
    return repr(text) if " " in text or not text else text
