"""The kinds of fits, by their names and colours in figures and tables."""

from __future__ import annotations

from ..config.specs import GroupedSpec, KroneckerSpec, LowRankSpec, MatrixSpec

# The colours are distinct for the colour-blind too (Okabe and Ito).
KINDS = {
    "stays dense": "#999999",
    "low rank": "#0072B2",
    "low rank by groups of rows": "#56B4E9",
    "Kronecker sum": "#E69F00",
    "mixed sum": "#009E73",
}


def kind_of(spec: MatrixSpec | None) -> str:
    """The kind of a spec, one of `KINDS`; None is a matrix that stays dense."""
    if spec is None:
        return "stays dense"
    if isinstance(spec, LowRankSpec):
        return "low rank"
    if isinstance(spec, GroupedSpec):
        return "low rank by groups of rows"
    return "Kronecker sum" if isinstance(spec, KroneckerSpec) else "mixed sum"
