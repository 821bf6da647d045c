"""The command line: names the commands and imports what they need when they run, so that `--help` is quick.

Exit codes: 0 done, 1 failed, 2 wrong settings or wrong use (every wrong field is named at once), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from loadtest.__main__ import loadtest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from rich.console import Console

    from gateway.client import Client
    from pipeline.api_keys import ApiKey, KeyRing
    from pipeline.connection import Link
    from pipeline.dead import DeadLetters, Letter
    from pipeline.settings import Settings

T = TypeVar("T")

DATA_DIR = Path(".penstock")
GATEWAY_URL = "http://127.0.0.1:8000"

app = typer.Typer(
    help="Leads requests to language models through Redis Streams, and loses none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
dead = typer.Typer(help="Dead letters: entries that could not be worked on.", no_args_is_help=True)
app.add_typer(dead, name="dead")
db = typer.Typer(help="The database of the history.", no_args_is_help=True)
app.add_typer(db, name="db")
api_keys = typer.Typer(help="API keys, made and revoked while gateways run.", no_args_is_help=True)
app.add_typer(api_keys, name="keys")

bridge = typer.Typer(help="Bridges to other brokers, for back ends that cannot change.", no_args_is_help=True)
app.add_typer(bridge, name="bridge")

DataDir = Annotated[Path, typer.Option(help="Where `up` keeps Redis' files, the index, the history.", file_okay=False)]
RedisUrl = Annotated[str | None, typer.Option(help="A running Redis; else REDIS_URL, or the one of `penstock up`.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts.")]


def main() -> None:
    """Run the command line; wrong settings end with exit code 2 and no traceback."""
    from pipeline.errors import ConfigError, PenstockError

    try:
        app(prog_name="penstock")
    except ConfigError as error:
        sys.stderr.write(f"penstock: {error}\n")
        sys.exit(2)
    except PenstockError as error:
        sys.stderr.write(f"penstock: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# --- Running -----------------------------------------------------------------------------------


@app.command()
def up(
    ask: Annotated[str | None, typer.Option(help="A question to answer as soon as everything is ready.")] = None,
    llm: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A real replica (OpenAI protocol); repeat for more.")
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway, 8000 by default; 0 takes a free one.")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow a public address without API keys.")] = False,
) -> None:
    """Run everything on this machine: Redis, mock replicas, the stages, the gateway. Ctrl-C drains."""
    from pipeline import starting

    starting.begin()
    import uvloop

    from pipeline import local, logs

    overrides: dict[str, dict[str, Any]] = {
        "redis": {"url": redis_url},
        "llm": {"urls": tuple(llm) if llm else None},
        "gateway": {"host": host, "port": port, "insecure": insecure or None},
    }
    settings = _settings(overrides)
    if "path" not in settings.retriever.model_fields_set:
        overrides["retriever"] = {"path": data_dir.resolve() / "index"}
    if "url" not in settings.history.model_fields_set:
        overrides["history"] = {"url": _history_in(data_dir)}
    settings = _settings(overrides)
    logs.configure(settings.log, "up", sys.stderr)
    plan = local.Plan(
        settings,
        data_dir.resolve(),
        start_redis="url" not in settings.redis.model_fields_set,
        start_mocks=not settings.llm.urls,
        fill=lambda url: _index_own_docs(settings, url),
        before_fill=_import_client,
        after_ready=(lambda url: _answer(settings, url, ask)) if ask else None,
        environ=_environ(overrides),
    )
    starting.end()
    uvloop.run(local.up(plan))


@app.command()
def gateway(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow a public address without API keys.")] = False,
) -> None:
    """Run one gateway."""
    settings = _settings({"gateway": {"host": host, "port": port, "insecure": insecure or None}})
    from gateway.__main__ import run as run_gateway

    raise typer.Exit(run_gateway(settings))


@app.command()
def stage(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="encoder, retriever, llm, aggregator, webhook, chat, image, report, delivery, recorder",
        ),
    ],
) -> None:
    """Run one or more stages in this process."""
    settings = _settings()
    from stages.__main__ import run as run_stages

    raise typer.Exit(run_stages(names, settings))


@app.command()
def telegram() -> None:
    """Connect a Telegram bot to the chats: one process per bot."""
    settings = _settings()
    from gateway.telegram import run as run_telegram

    raise typer.Exit(run_telegram(settings))


@bridge.command("amqp")
def bridge_amqp() -> None:
    """Carry requests for reports from RabbitMQ into Redis, and their responses back; see docs/REPORTS.md."""
    settings = _settings()
    from stages.__main__ import run as run_stages

    raise typer.Exit(run_stages(["amqp"], settings))


@app.command("mock-llm")
def mock_llm(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 0,
    latency: Annotated[str, typer.Option(help="Seconds: 0.05, fixed:0.05 or lognormal:MEDIAN,SIGMA.")] = "fixed:0.05",
    tokens_per_second: Annotated[float, typer.Option(help="Pace of the answer; 0: at once.")] = 0.0,
    slots: Annotated[int, typer.Option(help="Calls answered at once; others wait.")] = 16,
    fail_rate: Annotated[float, typer.Option(help="Share of calls that fail, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Latencies and failures are drawn from it.")] = 0,
    record: Annotated[Path | None, typer.Option(help="File that gets one JSON line per request.")] = None,
) -> None:
    """Run a mock replica: speaks OpenAI's protocol and answers from the context it is given."""
    from loadtest.mock import MockOptions, run
    from pipeline.errors import ConfigError

    try:
        run(MockOptions(host, port, latency, tokens_per_second, slots, fail_rate, seed, record))
    except (ValueError, OSError) as error:
        raise ConfigError(f"mock-llm: {error}") from error


# --- Documents ---------------------------------------------------------------------------------


@app.command()
def ingest(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Markdown, text, HTML, PDF: files, or folders of them.")
    ],
    url: Annotated[str, typer.Option(help="The gateway.")] = GATEWAY_URL,
    api_key: Annotated[str | None, typer.Option(envvar="GATEWAY_API_KEY", help="Sent as bearer token.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Send also what the index holds unchanged.")] = False,
    collection: Annotated[
        str | None, typer.Option(metavar="NAME", help="A knowledge base by itself, `medical` for medical reports.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Index documents; what the index holds already is left alone, so it may be interrupted and started again.

    Exit code 0: all are indexed; 1: some are not, with reasons; 2: wrong use; 3: no gateway.
    """
    import asyncio

    from gateway.client import GatewayRefused, GatewayUnreachable, Unusable
    from gateway.extractor import NICENESS
    from gateway.ingest import EXIT_UNREACHABLE, EXIT_USAGE, find_files

    os.nice(NICENESS)
    try:
        found = list(find_files(paths))
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        sys.stderr.write(f"penstock: {error.filename} {what}\n")
        raise typer.Exit(EXIT_USAGE) from None
    try:
        report = asyncio.run(_ingest(url, api_key, found, again=again, collection=collection, quiet=json))
    except Unusable as error:
        sys.stderr.write(f"penstock: {error}\n")
        raise typer.Exit(EXIT_USAGE) from None
    except GatewayRefused as error:
        sys.stderr.write(f"penstock: {url} refuses: {error}\n")
        raise typer.Exit(EXIT_USAGE) from None
    except GatewayUnreachable as error:
        sys.stderr.write(f"penstock: {error}\n")
        raise typer.Exit(EXIT_UNREACHABLE) from None
    if json:
        import orjson

        sys.stdout.write(orjson.dumps(report.as_json()).decode() + "\n")
    raise typer.Exit(report.exit_code)


async def _ingest(
    url: str, api_key: str | None, found: list[Any], *, again: bool, collection: str | None, quiet: bool
) -> Any:
    from gateway.client import Client
    from gateway.ingest import ingest as send
    from gateway.progress import watch

    with watch(len(found), quiet=quiet) as watcher:
        async with Client(url, api_key, on_wait=watcher.waits) as client:
            await client.check()
            report = await send(client, found, watcher.add, again=again, collection=collection)
        watcher.sum_up(report)
        return report


async def _import_client(_url: str) -> bool:
    """Import what `_index_own_docs` needs: in a thread, since it takes a while."""
    import asyncio

    from pipeline.starting import without_rich

    def load() -> None:
        with without_rich():
            import gateway.ingest  # noqa: F401

    await asyncio.to_thread(load)
    return True


async def _index_own_docs(settings: Settings, url: str) -> bool:
    """Index our own documents, so that the first question works; True when that was done."""
    import structlog

    from gateway.ingest import find_files
    from gateway.ingest import ingest as send

    async with _client(settings, url) as client:
        report = await send(client, list(find_files([_own_docs()])), lambda _result: None)
    structlog.get_logger().info("indexed our own documents", documents=len(report.indexed), skipped=len(report.skipped))
    return True


async def _answer(settings: Settings, url: str, question: str) -> bool:
    """Print the answer to *question*; True when there was one."""
    import structlog

    from gateway.client import GatewayRefused, GatewayUnreachable

    try:
        async with _client(settings, url) as client:
            sys.stdout.write(_render_answer(question, await client.ask(question)))
    except (GatewayRefused, GatewayUnreachable) as error:
        structlog.get_logger().error("no answer; everything keeps running", why=str(error))
        return False
    sys.stdout.flush()
    return True


def _client(settings: Settings, url: str) -> Client:
    from gateway.client import Client

    return Client(url, settings.gateway.api_keys[0].partition(":")[2] if settings.gateway.api_keys else None)


def _own_docs() -> Path:
    here = Path(__file__).resolve().parent
    in_tree = here / "docs"
    return in_tree if in_tree.is_dir() else here / "pipeline" / "_docs"


def _render_answer(question: str, answer: Mapping[str, Any]) -> str:
    lines = [f"\n{question}\n", f"{answer['answer']}\n"]
    for number, source in enumerate(answer.get("sources", ()), start=1):
        place = f"{source['document']}, chunk {source['chunk']}"
        lines.append(f"  [{number}] {source['title']} ({place})" if source.get("title") else f"  [{number}] {place}")
    return "\n".join(lines) + "\n\n"


# --- Looking after it --------------------------------------------------------------------------


@app.command()
def status(
    once: Annotated[bool, typer.Option("--once", help="Look once, also on a terminal.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1, max=3600)] = 1.0,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    json: AsJson = False,
) -> None:
    """Show what runs and how deep each queue is; on a terminal it goes on until Ctrl-C."""
    from pipeline.picture import look_closely
    from pipeline.status import make_console, render

    console = make_console()
    if console.is_terminal and not (once or json):
        _follow_status(console, every, redis_url, data_dir)
        return
    found = _on_redis(redis_url, data_dir, lambda link, _settings: look_closely(link))
    if json:
        _print_json(found.as_json())
    else:
        console.print(render(found, width=console.width))


def _follow_status(console: Console, every: float, redis_url: str | None, data_dir: Path) -> None:
    import asyncio
    from contextlib import suppress

    from pipeline.connection import Link
    from pipeline.status import ANSWER_S, follow

    def connect() -> Link:
        redis = _settings(_redis_override(redis_url, data_dir)).redis
        within_s = min(redis.reply_timeout_s, ANSWER_S)
        return Link(redis.model_copy(update={"reply_timeout_s": within_s}), "penstock")

    connect()  # wrong settings end it before anything is shown
    with suppress(KeyboardInterrupt):
        asyncio.run(follow(connect, console, every))


@app.command()
def verify(
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This check and those it needs; repeat it for more.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The gateway; else the one of `penstock up`, or http://127.0.0.1:8000.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GATEWAY_API_KEY", help="Sent as bearer token.")] = None,
    deliver_to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Send a message for real: a number (sms) or an email address.")
    ] = None,
    deliver_from: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Its sender; the recipient where nobody is named.")
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    json: AsJson = False,
) -> None:
    """Check a running system step by step: its parts, then its work. What it makes is removed at the end.

    Exit code 0: nothing failed; 1: something did, with what to do; 2: wrong settings or wrong use.
    """
    import asyncio

    from gateway.client import Unusable
    from gateway.verify import as_json, choose, shower, summary
    from pipeline.status import make_console

    def show(_verdict: object) -> None:
        """Say nothing: scripts get everything at the end."""

    from gateway.checks import CHECKS
    from gateway.trials import TRIALS

    try:
        chosen = choose([*CHECKS, *TRIALS], only or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    console = make_console()
    began_s = time.monotonic()
    try:
        verdicts = asyncio.run(
            _verify(
                chosen,
                *((show,) if json else shower(console)),
                url=url,
                api_key=api_key,
                deliver=(deliver_to, deliver_from),
                settings=_settings(_redis_override(redis_url, data_dir)),
                data_dir=data_dir,
            )
        )
    except Unusable as error:
        sys.stderr.write(f"penstock: {error}\n")
        raise typer.Exit(2) from None
    took_s = time.monotonic() - began_s
    if json:
        _print_json(as_json(verdicts, took_s))
    else:
        console.print(summary(verdicts, took_s, console.width), soft_wrap=True)
    raise typer.Exit(int(any(verdict.word == "FAIL" for verdict in verdicts)))


async def _verify(
    chosen: list[Any],
    *watchers: Any,
    url: str | None,
    api_key: str | None,
    deliver: tuple[str | None, str | None],
    settings: Settings,
    data_dir: Path,
) -> Any:
    from functools import partial

    from gateway.checks import Site, stuck
    from gateway.client import Client
    from gateway.trials import CLEAN_UP
    from gateway.verify import verify as run
    from pipeline import local
    from pipeline.connection import Link
    from pipeline.status import ANSWER_S

    own = local.running(data_dir)
    keys = settings.gateway.api_keys
    api_key = api_key or (keys[0].partition(":")[2] if keys else None)
    database_url = settings.history.url if "url" in settings.history.model_fields_set else None
    link = Link(settings.redis.model_copy(update={"reply_timeout_s": ANSWER_S}), "penstock")
    try:
        async with Client(url or (own or {}).get("url", GATEWAY_URL), api_key) as client:
            site = Site(
                client,
                link,
                settings,
                redis_name=_without_password(settings.redis.url),
                database_url=database_url or (_history_in(data_dir) if own else None),
                has_key=api_key is not None,
                deliver_to=deliver[0],
                deliver_from=deliver[1],
                trial_url=settings.webhook.trial_url or (own or {}).get("trial_url", ""),
            )
            return await run(chosen, CLEAN_UP, site, partial(stuck, site), *watchers)
    finally:
        await link.close()


def _without_password(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    return f"{scheme}{colon}{rest.rpartition('@')[2]}"


Names = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of letters.")]
All = Annotated[bool, typer.Option("--all", help="Every dead letter there is now.")]
EVERY = 1_000_000  # letters: more than any setting keeps


app.command()(loadtest)  # here, so that the help names it after what it measures


@dead.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.", min=1)] = 20,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    json: AsJson = False,
) -> None:
    """Show dead letters, the newest first."""
    found = _on_letters(redis_url, data_dir, lambda letters: letters.list(limit))
    if json:
        _print_json([letter.summary() for letter in found])
    else:
        typer.echo("\n".join(_letter_in_short(letter) for letter in found) or "no dead letters")


@dead.command("show")
def dead_show(
    name: Annotated[str, typer.Argument(metavar="ID", help="Id of a letter.")],
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Show one dead letter whole, as JSON."""
    _print_json(_on_letters(redis_url, data_dir, lambda letters: letters.show(name)))


@dead.command("retry")
def dead_retry(
    names: Names = None, every: All = False, redis_url: RedisUrl = None, data_dir: DataDir = DATA_DIR
) -> None:
    """Start the jobs of dead letters anew; prints the ids of the new jobs. Exit code 1: some cannot run."""

    async def retry(letters: DeadLetters, letter_id: str) -> str:
        return f"{letter_id} {await letters.retry(letter_id, time.time_ns() // 1_000_000)}"

    _each_letter(redis_url, data_dir, names, every=every, do=retry)


@dead.command("discard")
def dead_discard(
    names: Names = None, every: All = False, redis_url: RedisUrl = None, data_dir: DataDir = DATA_DIR
) -> None:
    """Throw dead letters away; prints their ids. Exit code 1: some were not there."""

    async def discard(letters: DeadLetters, letter_id: str) -> str:
        await letters.discard(letter_id)
        return letter_id

    _each_letter(redis_url, data_dir, names, every=every, do=discard)


def _each_letter(
    redis_url: str | None,
    data_dir: Path,
    names: list[str] | None,
    *,
    every: bool,
    do: Callable[[DeadLetters, str], Awaitable[str]],
) -> None:
    """Do something with each letter and say so; one that refuses does not stop the others."""
    from pipeline.errors import Reject

    if bool(names) == every:
        raise typer.BadParameter("name letters, or say --all")

    async def work(letters: DeadLetters) -> bool:
        refused = False
        for letter_id in names or [letter.id for letter in await letters.list(EVERY)]:
            try:
                typer.echo(await do(letters, letter_id))
            except Reject as reason:
                typer.echo(f"penstock: {reason}", err=True)
                refused = True
        return refused

    if _on_letters(redis_url, data_dir, work):
        raise typer.Exit(1)


def _on_letters(redis_url: str | None, data_dir: Path, work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    from pipeline.dead import DeadLetters

    return _on_redis(redis_url, data_dir, lambda link, settings: work(DeadLetters(link, settings)))


def _on_redis(redis_url: str | None, data_dir: Path, work: Callable[[Link, Settings], Awaitable[T]]) -> T:
    """Do something with a connection to Redis."""
    import asyncio

    from pipeline.connection import Link
    from pipeline.errors import BrokerUnavailable

    settings = _settings(_redis_override(redis_url, data_dir))

    async def run() -> T:
        link = Link(settings.redis, "penstock")
        try:
            return await work(link, settings)
        except BrokerUnavailable as error:
            if error.unknown:
                raise
            advice = "start `penstock up`, or name another Redis: --data-dir or --redis-url"
            raise BrokerUnavailable(f"{error}; {advice}") from error
        finally:
            await link.close()

    return asyncio.run(run())


def _letter_in_short(letter: Letter) -> str:
    line = f"{letter.id}  {_at(letter.at_ms)}  {letter.stage:<9}  {letter.reason}  {letter.job_id or '-'}"
    return line + (f"\n    {letter.error['message']}" if letter.error else "")


def _redis_override(redis_url: str | None, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Return where Redis is: as told, else as the environment says, else that of the `up` running on *data_dir*."""
    if redis_url is None and "url" not in _settings().redis.model_fields_set:
        from pipeline import local

        redis_url = (local.running(data_dir) or {}).get("redis_url")
    return {"redis": {"url": redis_url}}


def _print_json(value: Any) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


@db.command("upgrade")
def db_upgrade(
    database_url: Annotated[
        str | None, typer.Option(help="sqlite:///FILE or postgresql://...; else DATABASE_URL, or that of `up`.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Bring the tables of the history up to date; harmless where they are, and where others do so at the same time."""
    import asyncio

    from pipeline.records import Records

    settings = _settings({"history": {"url": database_url}})
    url = settings.history.url if "url" in settings.history.model_fields_set else _history_in(data_dir)

    async def upgrade() -> bool:
        records = Records.open(url, timeout_s=settings.history.timeout_s)
        try:
            return await records.upgrade()
        finally:
            await records.close()

    typer.echo("the tables were brought up to date" if asyncio.run(upgrade()) else "the tables are up to date")


def _history_in(data_dir: Path) -> str:
    return f"sqlite:///{data_dir.resolve() / 'history.db'}"


@api_keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called; a name is used once.")],
    tenant: Annotated[str | None, typer.Option(help="Whose key it is; the name, where nobody is named.")] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Make an API key and print it. It is shown this once, and kept nowhere."""
    typer.echo(_on_keys(redis_url, data_dir, lambda ring: ring.create(name, tenant or name)))


@api_keys.command("list")
def keys_list(redis_url: RedisUrl = None, data_dir: DataDir = DATA_DIR, json: AsJson = False) -> None:
    """Show the keys that were made, revoked ones too; never a key itself."""
    found = _on_keys(redis_url, data_dir, lambda ring: ring.list())
    if json:
        _print_json([record.as_json() for record in found])
    else:
        typer.echo("\n".join(_key_in_short(record) for record in found) or "no keys")


@api_keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")],
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Have a key refused everywhere, within a second, for ever. What was accepted of it goes on."""
    _on_keys(redis_url, data_dir, lambda ring: ring.revoke(name))


def _on_keys(redis_url: str | None, data_dir: Path, work: Callable[[KeyRing], Awaitable[T]]) -> T:
    from pipeline.api_keys import KeyRing

    return _on_redis(redis_url, data_dir, lambda link, _settings: work(KeyRing(link)))


def _key_in_short(record: ApiKey) -> str:
    revoked = "holds" if record.revoked_ms is None else f"revoked {_at(record.revoked_ms)}"
    return f"{record.name:<20}  {record.tenant:<20}  made {_at(record.created_ms)}  {revoked}"


def _at(instant_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(instant_ms / 1000))


# --- Settings ----------------------------------------------------------------------------------


def _settings(overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    from pipeline import settings

    return settings.load(os.environ, overrides)


def _environ(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the environment that gives *overrides* to a child process."""
    return {
        f"PENSTOCK_{section.upper()}__{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
        for section, fields in overrides.items()
        for name, value in fields.items()
        if value is not None
    }


if __name__ == "__main__":
    main()
