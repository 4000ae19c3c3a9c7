"""Figures in SVG, written by hand: the same input gives the same bytes, and nothing needs to be installed.

A figure is a string of elements. `document` makes a file of it, with a white background; `inline` makes an element of
an HTML page of it, whose text has the colour of the page. Every string that a caller passes is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.sax.saxutils import escape as _escape

# What XML cannot hold, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FONT = "ui-sans-serif, system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


def escape(text: str) -> str:
    """Text for XML and HTML, between tags or within double quotes.

    >>> escape('<b a="1">&')
    '&lt;b a=&quot;1&quot;&gt;&amp;'
    """
    return _escape(_NOT_XML.sub("�", text), {'"': "&quot;", "'": "&#39;"})


def element(name: str, *children: str, **attributes: str | float) -> str:
    """An element whose children are markup and whose attributes are text or numbers.

    An underscore in the name of an attribute is a hyphen, and one at its end is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value) if isinstance(value, int | float) else value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>"


def rectangle(x: float, y: float, width: float, height: float, color: str, **more: str | float) -> str:
    """A bar; one of no length has no element."""
    return element("rect", x=x, y=y, width=width, height=height, fill=color, **more) if width > 0 else ""


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: float = 11,
    longest: int | None = None,
    **more: str | float,
) -> str:
    """A line of text, its baseline at `y`. One with more letters than `longest` is cut, and has a title."""
    title = ""
    if longest is not None and len(text) > longest:
        title, text = element("title", escape(text)), f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
    return element("text", title, escape(text), x=x, y=y, text_anchor=anchor, font_size=size, **more)


def line(x1: float, y1: float, x2: float, y2: float, *, opacity: float = 0.25, **more: str | float) -> str:
    """A thin line in the colour of the text."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="currentColor", stroke_opacity=opacity, **more)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within the limits.

    >>> ticks(0.0, 0.43)
    [0.0, 0.1, 0.2, 0.3, 0.4]
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [round(step * (first + i), 12) for i in range(2 * count + 2)]
    return [value for value in found if value <= high + 1e-9 * step]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times powers of ten within positive limits."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def short(number: float) -> str:
    """A number as an axis has it.

    >>> [short(number) for number in (0, 0.25, 12.0, 1500, 5289472)]
    ['0', '0.25', '12', '1.5k', '5.29M']
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def inline(body: Sequence[str], width: float, height: float, title: str) -> str:
    """The figure as an element of an HTML page, as wide as its place."""
    return _svg(body, width, height, title, {"style": "width:100%;height:auto"})


def document(body: Sequence[str], width: float, height: float, title: str) -> str:
    """The figure as a file."""
    background = rectangle(0, 0, width, height, "#ffffff")
    figure = _svg(
        [background, *body],
        width,
        height,
        title,
        {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height, "color": "#1f2328"},
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{figure}\n'


def _svg(body: Sequence[str], width: float, height: float, title: str, more: dict[str, str | float]) -> str:
    box = f"0 0 {_number(width)} {_number(height)}"
    lines = ["", element("title", escape(title)), *filter(None, body), ""]
    return element(
        "svg",
        "\n".join(lines),
        **more,
        viewBox=box,
        role="img",
        font_family=_FONT,
        fill="currentColor",
    )


def _number(value: float) -> str:
    """A coordinate, rounded to what a screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
