"""Charts: lines and points over two axes as inline SVG; bars, heat maps and spreads as rows of names and strips, so
that long names stay readable on a phone. No script, no fonts, no colours of its own: series are classes `s0`, `s1` ...
and text is `currentColor`, which the page's style sheet decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 88, 18, 14, 60
COLOURS = 6  # classes s0 to s5, then again from s0
BAR = 70  # percent of the width that the longest bar takes


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order of x. A dashed series is a limit, drawn without marks."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    ticks: tuple[float, ...] = ()  # chosen where none are given


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """A chart with a legend below it; empty where no series has a point."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points]
    tall = _range(ys if y.log else [0.0, *ys], y)
    across = _scale(_range(xs, x), x.log, LEFT, WIDTH - RIGHT)
    up = _scale(tall, y.log, HEIGHT - BOTTOM, TOP)
    parts = [_open(title, _described(x, y, series))]
    for tick in y.ticks or _ticks(tall, y.log):
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 5, _number(tick), "end"))
    below = HEIGHT - BOTTOM + 22
    parts += [_text(across(tick), below, _number(tick), "middle") for tick in x.ticks or _ticks(_range(xs, x), x.log)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x.label, "middle"))
    parts.append(
        f'<text class="label" transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text>'
    )
    parts += [_line(number, one, across, up) for number, one in enumerate(series)]
    return _figure(title, parts, _legend(series))


def _line(number: int, one: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    places = [(across(px), up(py)) for px, py in one.points]
    colour = "limit" if one.dashed else f"s{number % COLOURS}"
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    line = f'<polyline class="line {colour}{" dashed" if one.dashed else ""}" points="{joined}"/>' if one.joined else ""
    if one.dashed:
        return line
    radius = 4 if len(places) <= 12 else 2.5
    marks = (
        f'<circle class="mark {colour}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}">'
        f"<title>{escape(one.name)}: {_number(px)}, {py:.3g}</title></circle>"
        for (a, b), (px, py) in zip(places, one.points, strict=True)
    )
    return line + "".join(marks)


def _described(x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """What a chart shows, in words."""
    peaks = [
        f"{one.name}: {y.label} from {min(v for _, v in one.points):.3g} to {max(v for _, v in one.points):.3g}"
        for one in series
        if not one.dashed
    ]
    return f"{y.label} against {x.label}. " + "; ".join(peaks)


def bars(
    title: str, values: Sequence[tuple[str, float, str]], limit: tuple[str, float] | None = None, kinds: int = 1
) -> str:
    """Horizontal bars (name, length, what is written beside it), and a limit as a dashed line through all of them.

    `kinds` colours take turns: 2 for pairs of before and after.
    """
    if not values:
        return ""
    longest = max([length for _, length, _ in values] + ([limit[1]] if limit else [])) or 1.0
    line = f'<span class="limit" style="left:{BAR * limit[1] / longest:.2f}%"></span>' if limit else ""
    rows = (
        f'<span class="name">{_name(name)}</span><span class="track"><span class="fill s{number % kinds}" '
        f'style="width:{BAR * length / longest:.2f}%"></span>{line}<span>{escape(beside)}</span></span>'
        for number, (name, length, beside) in enumerate(values)
    )
    note = f'<p class="legend"><span class="key limit">{escape(limit[0])}</span></p>' if limit else ""
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{"".join(rows)}</div>{note}</figure>'


Cell = tuple[str, str]  # a class, or an opacity such as ".4"; and what it says


def strips(title: str, rows: Sequence[tuple[str, Sequence[Cell]]], ends: Sequence[str], legend: str = "") -> str:
    """A row of cells for each name: a heat map, or what is on when; `ends` stand below the first and last column."""
    if not rows:
        return ""
    drawn = "".join(f'<span class="name">{_name(name)}</span>{_strip(name, cells)}' for name, cells in rows)
    foot = "".join(f"<span>{escape(end)}</span>" for end in ends)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="strips">{drawn}'
        f'<span class="foot-space"></span><span class="foot">{foot}</span></div>{legend}</figure>'
    )


def _strip(name: str, cells: Sequence[Cell]) -> str:
    drawn = []
    for place, (kind, said) in enumerate(cells):
        look = f'style="fill:rgba(var(--heat),{kind})"' if kind.startswith((".", "1")) else f'class="{kind}"'
        drawn.append(f'<rect {look} x="{place}" y="0" width="1" height="1"><title>{escape(said)}</title></rect>')
    alone = f'role="img" aria-label="{escape(name)}, {len(cells)} columns"'
    return f'<svg viewBox="0 0 {len(cells)} 1" preserveAspectRatio="none" {alone}>{"".join(drawn)}</svg>'


Spread = tuple[float, float | None, float, float | None, float]  # least, low, median, high, most


def spreads(title: str, rows: Sequence[tuple[str, Spread, str]], unit: str) -> str:
    """How values lie, a row each on one logarithmic scale: from least to most, between low and high, and the median."""
    rows = [row for row in rows if row[1][0] > 0]
    if not rows:
        return ""
    span = (min(spread[0] for _, spread, _ in rows) / 1.1, max(spread[4] for _, spread, _ in rows) * 1.1)
    across = _scale(span, True, 0, 100)
    drawn = "".join(
        f'<span class="name">{_name(name)}</span>{_spread(f"{name}: {beside or _said(spread, unit)}", spread, across)}'
        for name, spread, beside in rows
    )
    foot = f"<span>{_number(span[0])} {unit}</span><span>{_number(span[1])} {unit}, logarithmic</span>"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="strips">{drawn}'
        f'<span class="foot-space"></span><span class="foot">{foot}</span></div></figure>'
    )


def _said(spread: Spread, unit: str) -> str:
    return f"least {spread[0]:.3g} {unit}, median {spread[2]:.3g} {unit}, {spread[4]:.3g} {unit} at the end"


def _spread(said: str, spread: Spread, across: Callable[[float], float]) -> str:
    least, low, middle, high, most = (None if value is None else across(value) for value in spread)
    assert least is not None
    assert middle is not None
    assert most is not None
    box = (
        f'<rect class="range" x="{low:.2f}" y="3" width="{max(high - low, 0.3):.2f}" height="14"/>'
        if low is not None and high is not None
        else ""
    )
    line = (
        f'<line class="whisker" x1="{least:.2f}" x2="{most:.2f}" y1="10" y2="10" vector-effect="non-scaling-stroke"/>'
    )
    mark = (
        f'<line class="median" x1="{middle:.2f}" x2="{middle:.2f}" y1="2" y2="18" vector-effect="non-scaling-stroke"/>'
    )
    head = f'viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{escape(said)}"'
    return f"<svg {head}><title>{escape(said)}</title>{box}{line}{mark}</svg>"


def _open(title: str, described: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. {escape(described)}">'
        f"<desc>{escape(described)}</desc>"
    )


def _figure(title: str, parts: Sequence[str], legend: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{legend}</figure>"


def _legend(series: Sequence[Series]) -> str:
    kinds = ("limit" if one.dashed else f"s{number % COLOURS}" for number, one in enumerate(series))
    keys = (f'<span class="key {kind}">{escape(one.name)}</span>' for kind, one in zip(kinds, series, strict=True))
    return f'<p class="legend">{" ".join(keys)}</p>'


def _name(text: str) -> str:
    """A name, which may break behind its dots."""
    return escape(text).replace(".", ".<wbr/>")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _range(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    low, high = min(values), max(values)
    if axis.log:
        return (low / 1.3, high * 1.3)
    return (low, high * 1.08 if high > low else low + 1.0)


def _scale(span: tuple[float, float], log: bool, start: float, end: float) -> Callable[[float], float]:
    """From values to pixels; logarithmic scales take positive values only."""
    turn = math.log if log else float
    low, high = turn(span[0]), turn(span[1])
    return lambda value: start + (turn(value) - low) / (high - low) * (end - start)


def _ticks(span: tuple[float, float], log: bool) -> list[float]:
    low, high = span
    if log:
        steps = (1, 2, 5) if high / low < 300 else (1,)
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [step * 10.0**ten for ten in tens for step in steps if low <= step * 10.0**ten <= high]
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    if 0 < abs(value) < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
