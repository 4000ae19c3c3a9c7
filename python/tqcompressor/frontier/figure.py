"""The figure of a sweep in SVG: quality, and speed, against the size of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..compression.kinds import KINDS
from ..utils.svg import document, element, inline, label, line, log_ticks, short, ticks
from .results import SweepResult, SweepRow

_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _PLOT, _GAP = 860, 330, 62, 40, 340, 230, 90
# Perplexities that differ by more than this factor are on a logarithmic axis.
_FAR = 8.0
_COLOR, _ORIGINAL = KINDS["low rank"], "#D55E00"


def frontier_figure(result: SweepResult, *, standalone: bool = True) -> str:
    """Quality and tokens per second of each budget against the bytes of its weights, as SVG.

    `standalone` makes a file of it; otherwise it is an element for an HTML page. An infinite quality has no point.
    """
    rows = [row for row in result.rows if math.isfinite(row.quality)]
    values = [row.quality for row in rows if row.quality > 0]
    log_scale = result.measure == "perplexity" and bool(values) and max(values) > _FAR * min(values)
    body = [
        *_panel(_LEFT, rows, result.dense, lambda row: row.quality, result.measure, log_scale),
        *_panel(
            _LEFT + _PANEL + _GAP, rows, result.dense, lambda row: row.tokens_per_second, "tokens per second", False
        ),
    ]
    title = f"{result.measure.capitalize()} and speed against the size of the weights, by budget"
    return (document if standalone else inline)(body, _WIDTH, _HEIGHT, title)


def _panel(
    left: float,
    rows: Sequence[SweepRow],
    dense: SweepRow | None,
    value: Callable[[SweepRow], float],
    name: str,
    log_scale: bool,
) -> list[str]:
    shown = [*rows, *([] if dense is None or not math.isfinite(dense.quality) else [dense])]
    body = [
        label(left, 20, name, size=12, font_weight="600"),
        label(left + _PANEL / 2, _HEIGHT - 12, "bytes of weights", anchor="middle", size=11),
    ]
    if not shown:
        return [*body, label(left, _TOP + 20, "nothing is measured yet")]
    across = _limits([row.bytes for row in shown], False)
    up = _limits([value(row) for row in shown], log_scale)

    def x(row: SweepRow) -> float:
        return left + _PANEL * (row.bytes - across[0]) / (across[1] - across[0])

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
    path = " ".join(f"{x(row):.2f},{y(value(row)):.2f}" for row in rows)
    if len(rows) > 1:
        body.append(element("polyline", points=path, fill="none", stroke=_COLOR, stroke_width=1.5))
    for row in shown:
        original = row.budget is None
        body += [
            element("circle", cx=x(row), cy=y(value(row)), r=4, fill=_ORIGINAL if original else _COLOR),
            label(
                x(row),
                y(value(row)) - 8,
                "original" if original else str(row.budget),
                anchor="middle",
                size=10,
                longest=16,
            ),
        ]
    return body


def _limits(values: Sequence[float], log_scale: bool) -> tuple[float, float]:
    """The limits of an axis: those of the values, with room beyond."""
    low, high = min(values), max(values)
    if log_scale:
        return low / 1.3, high * 1.3
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
