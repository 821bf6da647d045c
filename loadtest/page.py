"""The report as one page: a single file with its plots in it, for a browser without a network.

The plots are SVG, written here: nothing is loaded, nothing runs. Texts that came from the target are escaped.
"""

from __future__ import annotations

import json
import math
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.report import Report
    from loadtest.waterfall import Fall

_WIDTH: Final = 720
_HEIGHT: Final = 260
_LEFT: Final = 64
_BOTTOM: Final = 34
_TOP: Final = 12
_RIGHT: Final = 14
_COLOURS: Final = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#8a8f98"),
)
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #5d6b7a; --line: #d8dee6; --paper: #fff; --card: #f5f7fa;
  --good: #1a7f4b; --bad: #c0322b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --dim: #98a5b3; --line: #36414d; --paper: #14191f;
  --card: #1d242c; --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 16px; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.45rem; margin: 0 0 4px } h2 { font-size: 1.08rem; margin: 30px 0 8px }
p { margin: 4px 0 } .dim { color: var(--dim) } .good { color: var(--good) } .bad { color: var(--bad) }
.verdict { padding: 10px 14px; border-left: 5px solid; background: var(--card); margin: 14px 0; border-radius: 4px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); gap: 10px; margin: 14px 0 }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; white-space: nowrap }
.card span { color: var(--dim); font-size: .85rem }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 28px }
.columns > div { min-width: 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--dim); font-weight: 500 } th:first-child, td:first-child { text-align: left }
td.name { text-align: left }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font-size: 12px }
svg .grid { stroke: var(--line); stroke-width: 1 } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .88rem; color: var(--dim); margin: 4px 0 }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px }
pre { background: var(--card); padding: 12px; border-radius: 8px; overflow-x: auto; font-size: .84rem }
@media (max-width: 600px) { body { font-size: 14px; padding: 12px } svg text { font-size: 19px }
  .scroll { font-size: 12px } th, td { padding: 4px 3px } th { white-space: normal }
  td { white-space: normal; overflow-wrap: break-word } td:first-child { overflow-wrap: anywhere; min-width: 6.5em } }
"""


def page(report: Report) -> str:
    """Return the whole page."""
    body = "\n".join(_parts(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # No favicon either: without this a browser asks a server for one.
        '<link rel="icon" href="data:,">'
        f"<title>Load test</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _parts(report: Report) -> Iterator[str]:
    manifest = report.manifest
    settings = manifest.get("settings", {})
    yield "<h1>Load test</h1>"
    where = f"{settings.get('url', '')}{settings.get('path', '')}"
    yield f'<p class="dim">{escape(where)} &middot; {escape(str(manifest.get("started_at", "")))}</p>'
    yield _verdict(report)
    yield _cards(report)
    yield '<div class="columns">'
    yield f"<div><h2>Latency over time</h2>{_over_time(report)}</div>"
    yield f"<div><h2>Percentile spectrum</h2>{_spectrum(report)}</div>"
    yield "</div>"
    yield f"<h2>Percentiles</h2>{_percentiles(report)}"
    if report.waterfall:
        yield f"<h2>Where the time went</h2>{_waterfall(report.waterfall)}"
    if report.slowest:
        yield f"<h2>Slowest requests</h2>{_slowest(report)}"
    yield '<div class="columns">'
    for title, counts in (
        ("Errors by kind", report.errors),
        ("Answers per worker", report.workers),
        ("Answers per replica", report.replicas),
    ):
        if counts:
            whole = sum(counts.values())
            rows = [[name, f"{count:,}", f"{count / whole:.1%}"] for name, count in counts.items()]
            yield f"<div><h2>{title}</h2>{_table(['', 'requests', 'share'], rows)}</div>"
    yield "</div>"
    shown = json.dumps(manifest, indent=1, default=str)
    yield f"<h2>How to repeat it</h2><pre>{escape(shown)}</pre>"


def _verdict(report: Report) -> str:
    lines = []
    if not report.verdict.is_valid:
        lines += ["<b>INVALID: the load tester did not keep its plan, so these figures are about itself</b>"]
        lines += [escape(reason) for reason in report.verdict.reasons]
    elif report.promise:
        lines += [f"<b>Promise {'kept' if report.is_kept else 'broken'}</b>"]
    else:
        lines += [f"<b>{'No request failed' if not report.failed else f'{report.failed:,} requests failed'}</b>"]
    for judged in report.promise:
        sign = '<span class="good">kept</span>' if judged.is_kept else '<span class="bad">broken</span>'
        lines.append(f"{sign} {escape(judged.clause)} (found {escape(judged.found_words)})")
    lines += [f"Warning: {escape(warning)}" for warning in report.verdict.warnings]
    if report.is_interrupted:
        lines.append(f"Interrupted, with {report.unfinished:,} requests under way")
    is_well = report.verdict.is_valid and (report.is_kept if report.promise else not report.failed)
    return f'<div class="verdict {"good" if is_well else "bad"}">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _cards(report: Report) -> str:
    latency = report.latency_ms
    cards = [
        (f"{report.throughput_per_s:,.1f}", "requests per second"),
        ("-" if latency is None else _ms(latency.p50), "P50 (median)"),
        ("-" if latency is None else _ms(latency.p99), "P99"),
        ("-" if latency is None else _ms(latency.max), "maximum"),
        (f"{report.total:,}", "requests"),
        (f"{report.failed / report.total:.2%}" if report.total else "-", "failed"),
        (f"{report.duration_s:,.1f} s", f"{report.loop} loop"),
    ]
    if report.good_within_ms is not None:
        cards.insert(1, (f"{report.goodput_per_s:,.1f}", f"per second within {report.good_within_ms:g} ms"))
    shown = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)
    return f'<div class="cards">{shown}</div>'


def _percentiles(report: Report) -> str:
    if report.latency_ms is None:
        return "<p>No request succeeded.</p>"
    columns = {"latency": report.latency_ms}
    if report.loop == "open" and report.service_ms is not None and report.lag_ms is not None:
        columns |= {"service time": report.service_ms, "send lag": report.lag_ms}
    rows = []
    for item, name in zip(report.percentiles, ("p50", "p90", "p95", "p99", "p99_9"), strict=True):
        beyond = f"{item.beyond:,}" + ("" if item.is_sure else " (too few)")
        rows.append([f"P{item.percent:g}", *(_ms(getattr(spans, name)) for spans in columns.values()), beyond])
    for title, name in (("Max", "max"), ("Average", "average")):
        rows.append([title, *(_ms(getattr(spans, name)) for spans in columns.values()), ""])
    since = "Latency counts from the planned start; service time from the start that came about."
    note = f'<p class="dim">{since} Sent late: {report.late:,}.</p>' if report.loop == "open" else ""
    return _table(["", *columns, "took longer"], rows) + note


def _slowest(report: Report) -> str:
    rows = [
        [slow.job_id or f"request {slow.number}", _ms(slow.latency_ms), f"{slow.at_s:.2f} s", slow.replica or ""]
        for slow in report.slowest
    ]
    return _table(["job", "latency", "planned at", "replica"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><td class="name">{escape(first)}</td>{cells}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


# --- Plots ------------------------------------------------------------------------------------------------------------


def _over_time(report: Report) -> str:
    seconds = report.seconds
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    for name, field in (("P50", "p50_ms"), ("P99", "p99_ms"), ("Max", "max_ms")):
        found = [(second.at_s, getattr(second, field)) for second in seconds]
        lines.append((name, [(at_s, value) for at_s, value in found if value is not None]))
    end_s = max((second.at_s + second.span_s for second in seconds), default=1.0)
    marks = [(at_s, f"{at_s:g} s") for at_s in _round_marks(0.0, end_s, 6)]
    failed = [second.at_s for second in seconds if second.failed]
    return _plot(lines, lambda at_s: at_s / end_s, marks, failed)


def _spectrum(report: Report) -> str:
    # Each nine is as wide as the one before: 90, 99, 99.9 at equal steps.
    points = [(_nines(percent), value) for percent, value in report.spectrum if percent < 100]
    if report.spectrum:
        points.append((max((x for x, _ in points), default=0.0) + 0.15, report.spectrum[-1][1]))
    end = max((x for x, _ in points), default=1.0)
    marks = [(_nines(p), f"{p:g}%") for p in (50.0, 90.0, 99.0, 99.9, 99.99, 99.999) if _nines(p) <= end]
    return _plot([("Latency", points)], lambda x: x / end, marks, [])


def _nines(percent: float) -> float:
    return -math.log10(max(1 - percent / 100, 1e-9))


def _plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    across: Callable[[float], float],
    marks: Sequence[tuple[float, str]],
    failed: Sequence[float],
) -> str:
    """Return lines over a grid, upwards in logarithms of milliseconds.

    Args:
        across: from a point's x to the share of the width.
        failed: x of the parts of the run in which requests failed; marked at the bottom.
    """
    values = [value for _, points in lines for _, value in points]
    if not values:
        return "<p>No request succeeded.</p>"
    low = math.floor(math.log10(max(min(values), 0.001)) * 2) / 2
    high = max(math.ceil(math.log10(max(max(values), 0.001)) * 2) / 2, low + 0.5)

    def x_of(x: float) -> float:
        return _LEFT + across(x) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        share = (math.log10(max(value, 0.001)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for step in steps:
            value = step * 10.0**exponent
            if low - 1e-9 <= math.log10(value) <= high + 1e-9:
                y = y_of(value)
                parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
                parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x, label in marks:
        at = x_of(x)
        anchor = "start" if at < _LEFT + 20 else "end" if at > _WIDTH - _RIGHT - 30 else "middle"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 12}" text-anchor="{anchor}">{label}</text>')
    for number, (_, points) in enumerate(lines):
        shown = " ".join(f"{x_of(x):.1f},{y_of(value):.1f}" for x, value in points)
        if len(points) == 1:
            shown = f"{shown} {x_of(points[0][0]) + 3:.1f},{y_of(points[0][1]):.1f}"
        parts.append(f'<polyline points="{shown}" stroke="{_COLOURS[number]}"/>')
    bottom = f'cy="{_HEIGHT - _BOTTOM}" r="4" fill="{_COLOURS[3]}"'
    parts += [f'<circle cx="{x_of(x):.1f}" {bottom}/>' for x in failed]
    parts.append("</svg>")
    names = [(name, _COLOURS[number]) for number, (name, _) in enumerate(lines)]
    return "".join(parts) + _key([*names, ("requests failed", _COLOURS[3])] if failed else names, "ms, logarithmic")


def _waterfall(falls: Sequence[Fall]) -> str:
    """Return one bar for each percentile, each as long as its latency, beside a table of the same."""
    names = list(dict.fromkeys(name for fall in falls for name in fall.spans_ms))
    colour = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    longest = max(fall.whole_ms for fall in falls) or 1.0
    high = 40
    parts = [f'<svg viewBox="0 0 {_WIDTH} {high * len(falls)}" role="img">']
    for row, fall in enumerate(falls):
        y, at = row * high, float(_LEFT)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 25}" text-anchor="end">P{fall.percent:g}</text>')
        for name, span in fall.spans_ms.items():
            width = span / longest * (_WIDTH - _LEFT - _RIGHT)
            title = f"<title>{escape(name)}: {_ms(span)}</title>"
            shape = f'x="{at:.2f}" y="{y + 6}" width="{width:.2f}" height="{high - 12}" fill="{colour[name]}"'
            parts.append(f"<rect {shape}>{title}</rect>")
            at += width
    parts.append("</svg>")
    rows = [[name, *(f"{fall.spans_ms.get(name, 0.0):.2f}" for fall in falls)] for name in names]
    rows.append(["together", *(f"{fall.whole_ms:.2f}" for fall in falls)])
    rows.append(["requests", *(f"{fall.samples:,}" for fall in falls)])
    table = _table(["ms", *(f"P{fall.percent:g}" for fall in falls)], rows)
    return "".join(parts) + _key(list(colour.items()), "") + table


def _key(names: Sequence[tuple[str, str]], unit: str) -> str:
    shown = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names)
    return f'<div class="key">{shown}{f"<span>{unit}</span>" if unit else ""}</div>'


def _round_marks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from *low* to *high*, at most *most* and one."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [low + number * step for number in range(int((high - low) / step + 1e-9) + 1)]


def _ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.2f} s"
    return f"{value:,.0f} ms" if value >= 1000 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"
