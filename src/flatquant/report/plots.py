"""Figures as SVG text: curves, bars and a map of colours.

Drawn by hand, since a report is to be one file without scripts that takes the reader's light or dark colours: text is
`currentColor`, series take their colour from CSS variables, and a figure on its own brings defaults for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

# Okabe and Ito's colours, which the colour-blind can tell apart; a little lighter on dark.
COLOURS = ("#8a8f98", "#d98200", "#3a9bdc", "#00936b", "#c45a9b", "#b8a800")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:currentColor}"
    ".grid{stroke:currentColor;stroke-opacity:.15}.axis{stroke:currentColor;stroke-opacity:.5}"
    ".line{fill:none;stroke-width:2.2}svg{color:#1b1f24;max-width:100%;height:auto}"
    "@media(max-width:520px){text{font-size:13px}}"
    "@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}"
)
_ZONES = ("#00936b", "#7fb23a", "#d98200", "#c4423f")  # of a verdict's scale, best first; named beside, too
WIDTH, HEIGHT = 420, 270  # small enough that text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 44


def svg(body: str, title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """A figure; `title` is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" width="{width}" height="{height}"><title>{escape(title)}</title>{body}</svg>'
    )


def standalone(figure: str) -> str:
    """The figure as a file of its own."""
    return figure.replace("</title>", f"</title><style>{STYLE}</style>", 1) + "\n"


def number(value: float) -> str:
    """Three digits, without an exponent where a reader needs none."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _labels(x_label: str, y_label: str, right: float) -> str:
    turned = f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    return (
        _text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle")
        + f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>'
    )


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, (last - first) // 5)
        for digits in ((1,), (1, 2, 5)):
            every = (m * 10.0**e for e in range(first, last + 1, step) for m in digits)
            inside = [value for value in every if low <= value <= high]
            if len(inside) > 2:
                return inside
        if len(inside) > 1 and inside[-1] > 1.6 * inside[0]:
            return inside
    step = 10 ** math.floor(math.log10((high - low) / 4 or 1))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axes:
    """Maps numbers to places, and draws what stands around them."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, log: bool = False, top: float = TOP) -> None:
        (x0, x1), (y0, y1) = x, y
        self.top = top
        self.x, self.log = (x0, x1 if x1 > x0 else x0 + 1), log
        if log:
            y0 = max(y0, y1 * 1e-9, 1e-300)
            y1 = max(y1, y0 * 1.5)
        self.y = (y0, y1 if y1 > y0 else y0 + 1)

    def at_x(self, value: float) -> float:
        """Horizontal place."""
        x0, x1 = self.x
        return LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        """Vertical place."""
        y0, y1 = self.y
        if self.log:
            value, y0, y1 = (math.log10(max(v, y0)) for v in (value, y0, y1))
        return HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - self.top - BOTTOM)

    def frame(self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> str:
        """Grid lines, ticks and labels."""
        out = []
        base = HEIGHT - BOTTOM
        for value in _ticks(*self.y, self.log):
            y = self.at_y(value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(_text(LEFT - 6, y + 4, number(value), "end"))
        for value in _ticks(*self.x, False) if x_ticks is None else x_ticks:
            out.append(_text(self.at_x(value), base + 17, number(value), "middle"))
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        return "".join(out) + _labels(x_label, y_label, WIDTH - RIGHT)


def lines(
    series: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    span: tuple[float, float] | None = None,
    zero: bool = True,
) -> str:
    """Curves over their positions, or spread over `span`, with a legend; `zero`: a linear axis begins there."""
    values = [v for curve in series.values() for v in curve if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return ""
    longest = max(len(curve) for curve in series.values())
    x0, x1 = span or (0, longest - 1)
    keys, top = _legend(series)
    axes = Axes((x0, x1), (min(0.0, *values) if zero and not log else min(values), max(values)), log=log, top=top)
    whole = range(0, longest, max(1, longest // 8)) if span is None else None
    body = [keys, axes.frame(x_label, y_label, whole)]
    for index, curve in enumerate(series.values()):
        width = (x1 - x0) / max(len(curve) - 1, 1)
        points = " ".join(
            f"{axes.at_x(x0 + i * width):.1f},{axes.at_y(v):.1f}" for i, v in enumerate(curve) if math.isfinite(v)
        )
        colour = COLOURS[index % len(COLOURS)] + (";stroke-dasharray:5 3" if index >= len(COLOURS) else "")
        body.append(f'<polyline class="line" style="stroke:{colour}" points="{points}"/>')
    return svg("".join(body), title)


def _legend(names: Iterable[str]) -> tuple[str, float]:
    """Keys in rows above the plot, and where the plot may begin."""
    out, x, y = [], float(LEFT), TOP + 4.0
    for index, name in enumerate(names):
        width = 36 + 8.2 * len(name)
        if x + width > WIDTH - RIGHT and x > LEFT:
            x, y = float(LEFT), y + 17
        colour = COLOURS[index % len(COLOURS)]
        dashes = ";stroke-dasharray:5 3" if index >= len(COLOURS) else ""
        style = f"stroke:{colour};stroke-width:3{dashes}"
        out.append(f'<line x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y - 4}" y2="{y - 4}" style="{style}"/>')
        out.append(_text(x + 23, y, name))
        x += width
    return "".join(out), y + 12


def bars(values: Sequence[float], title: str, x_label: str, y_label: str) -> str:
    """One bar per position."""
    if not values:
        return ""
    axes = Axes((-0.5, len(values) - 0.5), (0.0, max(*values, 0.0)))
    each = (WIDTH - LEFT - RIGHT) / len(values)
    step = max(1, len(values) // 8)
    body = [axes.frame(x_label, y_label, range(0, len(values), step))]
    for i, value in enumerate(values):
        top, base = axes.at_y(max(value, 0.0)), HEIGHT - BOTTOM
        body.append(
            f'<rect x="{axes.at_x(i) - 0.4 * each:.1f}" y="{top:.1f}" width="{0.8 * each:.1f}" '
            f'height="{max(base - top, 0.5):.1f}" style="fill:{COLOURS[3]}"><title>{i}: {number(value)}</title></rect>'
        )
    return svg("".join(body), title)


def shares(parts: Mapping[str, float], title: str, unit: str) -> str:
    """Horizontal bars with names and values, largest first."""
    parts = {name: value for name, value in parts.items() if value > 0}
    if not parts:
        return ""
    top, height = max(parts.values()), 26
    body: list[str] = []
    for row, (name, value) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
        y, width = 6 + row * height, 170 * value / top
        body.append(_text(170, y + 14, name, "end"))
        body.append(f'<rect x="176" y="{y}" width="{max(width, 1):.1f}" height="18" style="fill:{COLOURS[2]}"/>')
        body.append(_text(182 + width, y + 14, f"{number(value)} {unit}"))
    return svg("".join(body), title, WIDTH, 12 + height * len(parts))


def scale(value: float | None, bounds: Mapping[str, float], beyond: str, title: str, unit: str) -> str:
    """A logarithmic scale in named zones, with a mark where the value is; None is past its end.

    Args:
        bounds: the largest value of each zone, in any order: JSON keeps none.
        beyond: name of the zone after the last bound.
    """
    bounds = dict(sorted(bounds.items(), key=lambda item: item[1]))
    zones = [*bounds, beyond]
    low, high = min(bounds.values()) / 8, max(bounds.values()) * 8
    ends = [low, *bounds.values(), high]
    left, right, top, height = 8, WIDTH - 8, 30, 18

    def at(v: float) -> float:
        share = math.log(min(max(v, low), high) / low) / math.log(high / low)
        return left + share * (right - left)

    body = []
    for i, name in enumerate(zones):
        x0, x1 = at(ends[i]), at(ends[i + 1])
        place = f'x="{x0:.1f}" y="{top}" width="{x1 - x0:.1f}" height="{height}"'
        body.append(f'<rect {place} style="fill:{_ZONES[i % len(_ZONES)]}"/>')
        body.append(_text((x0 + x1) / 2, top + height + 15, name, "middle"))
    for bound in bounds.values():
        body.append(_text(at(bound), top + height + 30, number(bound), "middle"))
    x = at(high if value is None else value)
    body.append(f'<path d="M{x:.1f} {top + 2} l-7 -11 h14 z" fill="currentColor"/>')
    body.append(f'<path d="M{x:.1f} {top} v{height}" stroke="currentColor" stroke-width="2"/>')
    told = "not finite" if value is None else f"{number(value)} {unit}"
    anchor = "start" if x < WIDTH / 3 else "end" if x > 2 * WIDTH / 3 else "middle"
    body.append(_text(x + {"start": -7, "end": 7, "middle": 0}[anchor], top - 14, told, anchor))
    return svg("".join(body), title, WIDTH, top + height + 38)


def heat(rows: Sequence[Sequence[float]], title: str, x_label: str, y_label: str) -> str:
    """A map of colours: rows from below, on a logarithmic scale from its least to its largest value."""
    values = [v for row in rows for v in row if v > 0]
    if not values:
        return ""
    low, high = math.log10(max(min(values), max(values) * 1e-4)), math.log10(max(values))
    columns = max(len(row) for row in rows)
    width, height = (WIDTH - LEFT - RIGHT - 66) / columns, (HEIGHT - TOP - BOTTOM) / len(rows)
    body = []
    for i, row in enumerate(rows):
        y = HEIGHT - BOTTOM - (i + 1) * height
        for j, value in enumerate(row):
            share = (math.log10(max(value, 10**low)) - low) / ((high - low) or 1)
            body.append(
                f'<rect x="{LEFT + j * width:.2f}" y="{y:.2f}" width="{width + 0.3:.2f}" height="{height + 0.3:.2f}" '
                f'fill="{_heat_colour(share)}"/>'
            )
    edge, step = WIDTH - RIGHT - 54, (HEIGHT - TOP - BOTTOM) / 24
    for k in range(24):
        y = HEIGHT - BOTTOM - (k + 1) * step
        colour = _heat_colour(k / 23)
        body.append(f'<rect x="{edge}" y="{y:.1f}" width="12" height="{step + 0.3:.1f}" fill="{colour}"/>')
    body.append(_text(edge + 15, TOP + 9, number(10**high)) + _text(edge + 15, HEIGHT - BOTTOM, number(10**low)))
    for i in range(0, len(rows), max(1, len(rows) // 6)):
        body.append(_text(LEFT - 6, HEIGHT - BOTTOM - (i + 0.5) * height + 4, str(i), "end"))
    for j in range(0, columns, max(1, columns // 6)):
        body.append(_text(LEFT + (j + 0.5) * width, HEIGHT - BOTTOM + 17, str(j), "middle"))
    body.append(_labels(x_label, y_label, edge))
    return svg("".join(body), title)


# Viridis, at five places: as light as the value is large, in print too.
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _heat_colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    index = min(int(place), len(_HEAT) - 2)
    mixed = (a + (b - a) * (place - index) for a, b in zip(_HEAT[index], _HEAT[index + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)
