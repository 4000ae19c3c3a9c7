"""The figure of a sweep in SVG: quality, and speed, against the size of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compression.kinds import KINDS
from ..utils.svg import document, element, inline, label, line, log_ticks, short, ticks

_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _PLOT, _GAP = 860, 330, 62, 40, 340, 230, 90
# Perplexities that differ by more than this factor are on a logarithmic axis.
_FAR = 8.0
_COLOR, _ORIGINAL = KINDS["low rank"], "#D55E00"


@dataclass(frozen=True)
class Point:
    """One model in the figure."""

    name: str
    bytes: int
    quality: float
    tokens_per_second: float


def frontier_figure(measure: str, points: Sequence[Point], original: Point | None, *, standalone: bool = True) -> str:
    """Quality and tokens per second of each model against the bytes of its weights, as SVG.

    `measure` is the name of the quality. `standalone` makes a file of it; otherwise it is an element for an HTML page.
    An infinite quality has no point.
    """
    points = [point for point in points if math.isfinite(point.quality)]
    original = None if original is None or not math.isfinite(original.quality) else original
    values = [point.quality for point in points if point.quality > 0]
    log_scale = measure == "perplexity" and bool(values) and max(values) > _FAR * min(values)
    second = _LEFT + _PANEL + _GAP
    body = [
        *_panel(_LEFT, points, original, lambda point: point.quality, measure, log_scale),
        *_panel(second, points, original, lambda point: point.tokens_per_second, "tokens per second", False),
    ]
    title = f"{measure.capitalize()} and speed against the size of the weights, by budget"
    return (document if standalone else inline)(body, _WIDTH, _HEIGHT, title)


def _panel(
    left: float,
    points: Sequence[Point],
    original: Point | None,
    value: Callable[[Point], float],
    name: str,
    log_scale: bool,
) -> list[str]:
    shown = [*points, *([] if original is None else [original])]
    body = [
        label(left, 20, name, size=12, font_weight="600"),
        label(left + _PANEL / 2, _HEIGHT - 12, "bytes of weights", anchor="middle", size=11),
    ]
    if not shown:
        return [*body, label(left, _TOP + 20, "nothing is measured yet")]
    across = _limits([point.bytes for point in shown], False)
    up = _limits([value(point) for point in shown], log_scale)

    def x(point: Point) -> float:
        return left + _PANEL * (point.bytes - across[0]) / (across[1] - across[0])

    def y(number: float) -> float:
        low, high, at = (math.log(each) if log_scale else each for each in (*up, number))
        return _TOP + _PLOT * (1 - (at - low) / (high - low))

    for tick in log_ticks(*up) if log_scale else ticks(*up):
        body += [
            line(left, y(tick), left + _PANEL, y(tick)),
            label(left - 6, y(tick) + 3.5, short(tick), anchor="end", size=10),
        ]
    for tick in ticks(*across, 4):
        at = left + _PANEL * (tick - across[0]) / (across[1] - across[0])
        body += [
            line(at, _TOP, at, _TOP + _PLOT, opacity=0.12),
            label(at, _TOP + _PLOT + 15, short(tick), anchor="middle", size=10),
        ]
    path = " ".join(f"{x(point):.2f},{y(value(point)):.2f}" for point in points)
    if len(points) > 1:
        body.append(element("polyline", points=path, fill="none", stroke=_COLOR, stroke_width=1.5))
    for point in shown:
        at, height = x(point), y(value(point))
        color = _ORIGINAL if point is original else _COLOR
        body += [
            element("circle", cx=at, cy=height, r=4, fill=color),
            label(at, height - 8, point.name, anchor="middle", size=10, longest=16),
        ]
    return body


def _limits(values: Sequence[float], log_scale: bool) -> tuple[float, float]:
    """The limits of an axis: those of the values, with room beyond."""
    low, high = min(values), max(values)
    if log_scale:
        return low / 1.3, high * 1.3
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
