"""Charts as inline SVG: lines and points over two axes, and horizontal bars. No script, no fonts, no colours of its
own: series are classes `s0`, `s1` ... and text is `currentColor`, which the page's style sheet decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 52
COLOURS = 6  # classes s0 to s5, then again from s0
BAR, GAP = 22, 8
LABEL = 190  # width of a bar's name


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
    parts = [_open(title, WIDTH, HEIGHT)]
    for tick in y.ticks or _ticks(tall, y.log):
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 4, _number(tick), "end"))
    below = HEIGHT - BOTTOM + 18
    parts += [_text(across(tick), below, _number(tick), "middle") for tick in x.ticks or _ticks(_range(xs, x), x.log)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x.label, "middle"))
    parts.append(
        f'<text class="label" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text>'
    )
    parts += [_line(number, one, across, up) for number, one in enumerate(series)]
    return _figure(title, parts, _legend(series))


def _line(number: int, one: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    places = [(across(px), up(py)) for px, py in one.points]
    colour = f"s{number % COLOURS}"
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    line = f'<polyline class="line {colour}{" dashed" if one.dashed else ""}" points="{joined}"/>' if one.joined else ""
    marks = (
        ""
        if one.dashed
        else "".join(f'<circle class="mark {colour}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in places)
    )
    return line + marks


def bars(title: str, values: Sequence[tuple[str, float, str]], limit: tuple[str, float] | None = None) -> str:
    """Horizontal bars (name, length, what is written beside it), and a limit as a dashed line through all of them."""
    if not values:
        return ""
    height = len(values) * (BAR + GAP) + GAP
    longest = max([length for _, length, _ in values] + ([limit[1]] if limit else []))
    across = _scale((0.0, longest), False, LABEL, WIDTH - 120)
    parts = [_open(title, WIDTH, height)]
    for number, (name, length, beside) in enumerate(values):
        top = GAP + number * (BAR + GAP)
        width = max(across(length) - LABEL, 1.0)
        parts.append(_text(LABEL - 8, top + BAR - 6, name, "end"))
        parts.append(
            f'<rect class="bar s{number % COLOURS}" x="{LABEL}" y="{top}" width="{width:.1f}" height="{BAR}"/>'
        )
        parts.append(_text(LABEL + width + 6, top + BAR - 6, beside, "start"))
    if limit:
        at = across(limit[1])
        parts.append(f'<line class="line limit dashed" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}"/>')
    note = f'<p class="legend">dashed: {escape(limit[0])}</p>' if limit else ""
    return _figure(title, parts, note)


def _open(title: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _figure(title: str, parts: Sequence[str], legend: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{legend}</figure>"


def _legend(series: Sequence[Series]) -> str:
    keys = (f'<span class="key s{n % COLOURS}">{escape(one.name)}</span>' for n, one in enumerate(series))
    return f'<p class="legend">{" ".join(keys)}</p>'


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
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
