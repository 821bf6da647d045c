"""`python -m loadtest`: the load tester's command line. `penstock loadtest` is the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def loadtest(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="The target; requests go to --path under it.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", "-c", envvar="LT_CONCURRENCY", help="Closed loop: requests in flight, 50 by default."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", help="End after so many requests; 500 without --duration.")
    ] = None,
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Seconds to send requests for.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", "-r", help="Open loop: requests per second, whatever comes back.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="Open loop: constant gaps, or poisson.")] = "constant",
    ramp_from: Annotated[
        float | None, typer.Option(help="Open loop: rate at the start; it goes evenly to --rate.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(metavar="CLAUSES", help="A promise, e.g. 'p99<500ms,errors<0.1%'; broken: exit 99.")
    ] = None,
    saturate: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Find the highest rate between that keeps the promise.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="File with one question on each line; otherwise built-in ones.")
    ] = None,
    path: Annotated[str, typer.Option(help="Where requests go.")] = "/query",
    body: Annotated[
        str, typer.Option(help="JSON to send, or @FILE; {{question}} in a string becomes a question.")
    ] = '{"query": "{{question}}"}',
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="'Name: value'; repeat for more.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as bearer token.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same arrivals.")] = 0,
    processes: Annotated[int, typer.Option(help="Generators, each with a core of its own.")] = 1,
    connections: Annotated[int | None, typer.Option(help="Open loop: open connections at most.")] = None,
    max_lag: Annotated[float, typer.Option(help="Open loop: a send lag P99 above so many ms is invalid.")] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Write the report as one JSON object.")] = False,
    json_file: Annotated[Path | None, typer.Option(help="Write that JSON to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing while the test runs.")] = False,
) -> None:
    """Send requests in a closed or an open loop (--rate), and report where the time went.

    Exit codes: 0 all well, 1 some requests failed (no --slo), 99 promise broken, 2 bad options or no target, 3 the load
    tester could not keep its plan, 130 interrupted (with the report).
    """
    # Late, so that a command line that mounts this one pays nothing for it.
    from loadtest.options import LoadOptions
    from loadtest.report import EXIT_USAGE
    from loadtest.run import Outputs, run
    from loadtest.saturate import check_alone, read_bounds, search

    outputs = Outputs(json, json_file, html, quiet)
    source = context.get_parameter_source("concurrency")
    if source is not None and source.name == "ENVIRONMENT" and (rate is not None or saturate is not None):
        concurrency = None  # the variable is the default of closed loops, and stands in the way of no open one
    try:
        low, high = (None, None) if saturate is None else read_bounds(saturate)
        if saturate is not None:
            others = {"rate": rate, "ramp-from": ramp_from, "requests": requests, "html": html}
            check_alone(slo, [name for name, value in others.items() if value is not None])
        options = LoadOptions(
            url=url,
            concurrency=concurrency,
            requests=requests,
            duration_s=duration,
            questions=questions,
            timeout_s=timeout,
            api_key=api_key,
            rate=rate if high is None else high,
            pace=arrivals,  # type: ignore[arg-type]  # it is checked there
            ramp_from=ramp_from,
            seed=seed,
            processes=processes,
            connections=connections,
            max_lag_ms=max_lag,
            slo=slo,
            path=path,
            body=body,
            headers=tuple(header or ()),
        )
    except ValueError as error:
        typer.echo(f"loadtest: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    raise typer.Exit(run(options, outputs) if low is None or high is None else search(options, low, high, outputs))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(loadtest)
    app(prog_name="python -m loadtest")
