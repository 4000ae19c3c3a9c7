"""Several budgets side by side, measured on the user's own text: `sweep`, its result and its figure.

May import `errors`, `_core`, `utils`, `config`, `data`, `evaluate`, `calibration`, `compression`, `native`, `verify`
and `plots`. torch and matplotlib are imported inside the functions that use them.
"""
