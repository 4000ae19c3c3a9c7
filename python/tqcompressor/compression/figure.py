"""The figure of a compression: what is kept of every matrix, and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..utils.svg import document, inline, label, line, rectangle, short, ticks
from .kinds import KINDS, kind_of
from .report import CompressionReport, MatrixReport

# The two panels, from left to right, and the room for names.
_NAMES, _KEPT, _LOST, _GAP, _WIDTH = 215, 330, 240, 60, 860
_TOP, _BOTTOM = 62, 22
# Rows as high as their names, and as low as bars can be told apart where there are many.
_ROW, _LOW_ROW, _MANY = 16, 6, 64
# Longer names would leave the figure.
_LONGEST = 34


def report_figure(report: CompressionReport, *, standalone: bool = True) -> str:
    """The parameters of every matrix before and after, and its lost energy, as SVG.

    `standalone` makes a file of it; otherwise it is an element for an HTML page.
    """
    matrices = report.matrices
    norm = "norm of the calibration" if report.calibrated else "Frobenius norm"
    height = _TOP + _row_height(matrices) * max(len(matrices), 1) + _BOTTOM
    title = f"Parameters kept and energy lost ({norm}), matrix by matrix"
    body = [*_legend(matrices), *_rows(matrices), *_axes(matrices, height, norm)]
    return (document if standalone else inline)(body, _WIDTH, height, title)


def _row_height(matrices: Sequence[MatrixReport]) -> int:
    return _ROW if len(matrices) <= _MANY else _LOW_ROW


def _scales(matrices: Sequence[MatrixReport]) -> tuple[float, float]:
    """The largest parameters and lost energy; positive, so that bars can be divided by them."""
    largest = max((max(matrix.parameters_before, matrix.parameters_after) for matrix in matrices), default=1)
    lost = max((matrix.lost_energy or 0.0 for matrix in matrices), default=0.0)
    return float(max(largest, 1)), lost if lost > 0 else 1.0


def _legend(matrices: Sequence[MatrixReport]) -> list[str]:
    used = {kind_of(matrix.spec) for matrix in matrices}
    body, x = [], float(_NAMES)
    for kind, color in KINDS.items():
        if kind in used:
            body += [rectangle(x, 8, 11, 11, color), label(x + 16, 18, kind)]
            x += 34 + 6.2 * len(kind)
    return body


def _rows(matrices: Sequence[MatrixReport]) -> list[str]:
    largest, most = _scales(matrices)
    height = _row_height(matrices)
    lost_at, bar, body = _NAMES + _KEPT + _GAP, height - 2, []
    # Where rows are low, every third has its name.
    step = 1 if height == _ROW else 3
    for number, matrix in enumerate(matrices):
        y, color = _TOP + number * height, KINDS[kind_of(matrix.spec)]
        if number % step == 0:
            body.append(label(_NAMES - 8, y + min(height, 11) - 0.5, matrix.name, anchor="end", longest=_LONGEST))
        before, after = (_KEPT * count / largest for count in (matrix.parameters_before, matrix.parameters_after))
        body += [rectangle(_NAMES, y, before, bar, color, fill_opacity=0.3), rectangle(_NAMES, y, after, bar, color)]
        lost = matrix.lost_energy or 0.0
        body.append(rectangle(lost_at, y, _LOST * lost / most, bar, color))
        if height == _ROW:
            share = f"{matrix.parameters_after / max(matrix.parameters_before, 1):.0%}"
            body.append(label(_NAMES + max(before, after) + 4, y + 11, share, size=10))
    return body


def _axes(matrices: Sequence[MatrixReport], height: float, norm: str) -> list[str]:
    largest, most = _scales(matrices)
    lost_at, bottom = _NAMES + _KEPT + _GAP, height - _BOTTOM
    body = [
        label(_NAMES, 38, "parameters: before (pale), after", size=12, font_weight="600"),
        label(lost_at, 38, f"lost energy, {norm}", size=12, font_weight="600"),
    ]
    write: tuple[tuple[float, float, float, Callable[[float], str]], ...] = (
        (_NAMES, _KEPT, largest, short),
        (lost_at, _LOST, most, "{:.3g}".format),
    )
    for left, width, limit, text in write:
        for value in ticks(0.0, limit):
            x = left + width * value / limit
            body += [line(x, _TOP - 6, x, bottom), label(x, bottom + 14, text(value), anchor="middle", size=10)]
    return body
