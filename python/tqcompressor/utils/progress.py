"""Showing how far a long job is: the `progress` argument that every one of them takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

ProgressCallback: TypeAlias = Callable[[int, int], object]
# What a job calls: (done, total), and behind them, if it likes, a note to show beside the bar.
Report: TypeAlias = Callable[..., object]
# True and False switch the bar on and off; None shows it where somebody may be watching, in a terminal or a notebook,
# if tqdm is installed; a function is called with (done, total) in the job's own units.
ProgressOption: TypeAlias = bool | ProgressCallback | None


@contextmanager
def reporter(option: ProgressOption, description: str) -> Iterator[Report | None]:
    """Yields the `(done, total, note="")` callback that `option` asks for, or None, and closes the bar behind it.

    The bar is tqdm's. `True` without tqdm prints a percentage on standard error instead.
    """
    if option is None:
        tqdm = _tqdm() if _is_watched() else None
        wanted = tqdm is not None
    elif isinstance(option, bool):
        tqdm = _tqdm() if option else None
        wanted = option
    else:
        yield lambda done, total, note="": option(done, total)
        return

    if not wanted:
        yield None
    elif tqdm is None:
        try:
            yield lambda done, total, note="": print(
                f"\r{description}: {100 * done // max(total, 1)} % {note}", end="", file=sys.stderr, flush=True
            )
        finally:
            print(file=sys.stderr)
    else:
        # Units mean nothing to a reader, so the bar shows the share that is done and the time that is left.
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=1, desc=description, bar_format=layout) as bar:

            def show(done: int, total: int, note: str = "") -> None:
                bar.total = max(total, 1)
                bar.set_postfix_str(note, refresh=False)
                bar.update(done - bar.n)

            yield show


def _is_watched() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm
