"""PNG from the figures of `plots`: read back from their SVG, so that both formats are one drawing.

Only what `plots` writes is understood: lines, rectangles, polylines, and text that may be turned by a quarter.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import Any

from flatquant.errors import FlatQuantError

_INK, _PAPER, _FONT = "#1b1f24", "#ffffff", 12.0  # px, as in `plots.STYLE`
_POINTS = 0.75  # in a px
_ANCHORS = {"start": "left", "middle": "center", "end": "right"}


def figure_class(what: str, way_out: str) -> Any:
    """matplotlib's class of figures.

    Raises:
        FlatQuantError: matplotlib is not installed: what needs it, and the way out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlatQuantError(f"{what}: pip install 'flatquant[plot]', or {way_out}") from error
    return Figure


def png(figure: str, *, scale: float = 2.0) -> bytes:
    """A figure on white, as the bytes of a PNG file.

    Args:
        figure: SVG, as a function of `plots` returns it.
        scale: PNG pixels for one of the SVG.

    Raises:
        FlatQuantError: matplotlib is not installed.
    """
    figure_of = figure_class("PNG figures need matplotlib", "leave them out with --no-png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    root = ET.fromstring(figure)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    image = figure_of(figsize=(width / 96, height / 96), dpi=96 * scale, facecolor=_PAPER)
    axes = image.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for element in root:
        _draw(axes, element)
    out = io.BytesIO()
    FigureCanvasAgg(image).print_png(out, metadata={"Software": None})
    return out.getvalue()


def _draw(axes: Any, element: ET.Element) -> None:
    style = dict(part.split(":", 1) for part in element.get("style", "").split(";") if part)
    kind, name = element.tag.rpartition("}")[2], element.get("class", "")

    def at(key: str) -> float:
        return float(element.get(key, 0))

    match kind:
        case "line" | "polyline":
            if kind == "line":
                points = [(at("x1"), at("y1")), (at("x2"), at("y2"))]
            else:
                points = [(float(x), float(y)) for x, y in (p.split(",") for p in element.get("points", "").split())]
            px = float(style.get("stroke-width", 2.2 if name == "line" else 1))
            dashes = style.get("stroke-dasharray")
            axes.plot(
                *zip(*points, strict=True),
                color=style.get("stroke", _INK),
                alpha={"grid": 0.15, "axis": 0.5}.get(name, 1.0),
                linewidth=px * _POINTS,
                linestyle=(0, [float(d) / px for d in dashes.split()]) if dashes else "-",
                solid_capstyle="butt",
            )
        case "rect":
            from matplotlib.patches import Rectangle

            fill = style.get("fill") or element.get("fill", _INK)
            axes.add_patch(Rectangle((at("x"), at("y")), at("width"), at("height"), facecolor=fill, linewidth=0))
        case "text":
            turned = re.match(r"translate\(([\d.]+) ([\d.]+)\) rotate\((-?\d+)\)", element.get("transform", ""))
            x, y, angle = (float(g) for g in turned.groups()) if turned else (at("x"), at("y"), 0.0)
            axes.text(
                x,
                y,
                (element.text or "").replace("$", r"\$"),
                color=_INK,
                size=_FONT * _POINTS,
                rotation=-angle,
                rotation_mode="anchor",
                ha=_ANCHORS[element.get("text-anchor", "start")],
                va="baseline",
            )
