"""`python -m loadtest`: the load tester's command line. `penstock loadtest` is the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def loadtest(
    url: Annotated[str, typer.Option(help="The gateway; requests go to /query under it.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", envvar="LT_CONCURRENCY", help="Requests in flight.")
    ] = 50,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", help="End after so many requests; 500 without --duration.")
    ] = None,
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Seconds to send requests for.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="File with one question on each line; otherwise built-in ones.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 60.0,
    api_key: Annotated[str | None, typer.Option(help="Sent as bearer token.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the report as one JSON object.")] = False,
) -> None:
    """Send questions in a closed loop and report latency percentiles, throughput and errors.

    Exit codes: 0 all succeeded, 1 some failed, 2 bad options or no target, 130 interrupted (with the report).
    """
    # Late, so that a command line that mounts this one pays nothing for it.
    from loadtest.closed import EXIT_USAGE, LoadOptions, run

    try:
        options = LoadOptions(url, concurrency, requests, duration, questions, timeout, api_key, json)
    except ValueError as error:
        typer.echo(f"loadtest: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    raise typer.Exit(run(options))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(loadtest)
    app(prog_name="python -m loadtest")
