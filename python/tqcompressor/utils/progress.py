"""The progress of long jobs: the `progress` argument that each of them takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

ProgressCallback: TypeAlias = Callable[[int, int], object]
# Called by a job with (done, total) and, optionally, a note to show beside the bar.
Report: TypeAlias = Callable[..., object]
# True and False switch the bar on and off. None shows it in a terminal or a notebook, if tqdm is installed. A function
# is called with (done, total) in the job's own units.
ProgressOption: TypeAlias = bool | ProgressCallback | None


@contextmanager
def reporter(option: ProgressOption, description: str) -> Iterator[Report | None]:
    """Yields the `(done, total, note="")` callback that `option` asks for, or None; closes the bar at the end.

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
        # Show the share done and the time left: the units differ from job to job.
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=1, desc=description, bar_format=layout) as bar:

            def show(done: int, total: int, note: str = "") -> None:
                bar.total = max(total, 1)
                bar.set_postfix_str(note, refresh=False)
                bar.update(done - bar.n)

            yield show


@contextmanager
def phase_reporter(option: ProgressOption) -> Iterator[Callable[[int, int, str], object] | None]:
    """As `reporter`, for a job that calls back with `(done, total, phase)`: each phase has a bar of its own."""
    if option is False:
        yield None
        return
    with ExitStack() as stack:
        shown: dict[str, Report | None] = {}

        def show(done: int, total: int, phase: str) -> None:
            if phase not in shown:
                stack.close()
                shown[phase] = stack.enter_context(reporter(option, phase))
            if (report := shown[phase]) is not None:
                report(done, total)

        yield show


def announce(option: ProgressOption, words: str) -> None:
    """Prints a line on standard error where `option` shows a bar."""
    if option is True or (option is None and _is_watched()):
        print(words, file=sys.stderr, flush=True)


def _is_watched() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm
