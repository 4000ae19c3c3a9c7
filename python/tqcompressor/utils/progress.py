"""The progress of long jobs: the `progress` argument that each of them takes, and the log.

Whatever the argument says, each job also logs its beginning, every tenth of it, and its end, at the level INFO, to the
logger of this module. It is a child of the logger `tqcompressor`, which shows nothing unless the program asks for it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

ProgressCallback: TypeAlias = Callable[[int, int], object]
# Called by a job with (done, total) and, optionally, a note to show beside the bar.
Report: TypeAlias = Callable[..., object]
# True and False switch the bar on and off. None shows it in a terminal or a notebook, if tqdm is installed. A function
# is called with (done, total) in the job's own units.
ProgressOption: TypeAlias = bool | ProgressCallback | None

_LOGGER = logging.getLogger(__name__)


@contextmanager
def reporter(option: ProgressOption, description: str) -> Iterator[Report | None]:
    """Yields the `(done, total, note="")` callback that `option` asks for, or None; closes the bar at the end.

    The bar is tqdm's. `True` without tqdm prints a percentage on standard error instead. A job with a `description` is
    logged, too.
    """
    with _shown(option, description) as show, _logged(description) as log:
        yield _all_of(show, log)


def _all_of(*reports: Report | None) -> Report | None:
    """One callback for several; None for none, because a job without a callback does not stop to call it."""
    wanted = [report for report in reports if report is not None]
    if len(wanted) < 2:
        return wanted[0] if wanted else None

    def report_all(done: int, total: int, note: str = "") -> None:
        for report in wanted:
            report(done, total, note)

    return report_all


@contextmanager
def _logged(description: str) -> Iterator[Report | None]:
    """Yields the callback that logs every tenth of a job; None where the log leaves that level out."""
    if not description or not _LOGGER.isEnabledFor(logging.INFO):
        yield None
        return
    started, tenths = time.perf_counter(), 0

    def log(done: int, total: int, note: str = "") -> None:
        nonlocal tenths
        now = min(10 * done // max(total, 1), 10)
        # The end has a line of its own.
        if tenths < now < 10:
            tenths = now
            _LOGGER.info("%s: %d %%%s", description, 10 * now, f", {note}" if note else "")

    _LOGGER.info("%s: begins", description)
    try:
        yield log
    except BaseException:
        _LOGGER.info("%s: stopped after %.1f s", description, time.perf_counter() - started)
        raise
    _LOGGER.info("%s: done in %.1f s", description, time.perf_counter() - started)


@contextmanager
def _shown(option: ProgressOption, description: str) -> Iterator[Report | None]:
    """Yields the callback that shows a job as `option` asks, or None."""
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
    if option is False and not _LOGGER.isEnabledFor(logging.INFO):
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


def announce(option: ProgressOption, words: str, logger: logging.Logger = _LOGGER) -> None:
    """Prints a line on standard error where `option` shows a bar, and logs it to the logger of the job's room."""
    logger.info(words, stacklevel=2)
    if option is True or (option is None and _is_watched()):
        print(words, file=sys.stderr, flush=True)


def _is_watched() -> bool:
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and not a program that runs one and has imported ipykernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm
