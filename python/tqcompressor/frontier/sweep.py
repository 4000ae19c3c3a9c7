"""Several budgets for one checkpoint: compressed, measured on the user's own text, side by side."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import _core
from ..calibration.calibration import Calibration, load_calibration
from ..compression.budget import Budget, Spending, matrix_patterns, meaning, parsed
from ..compression.card import read_config, record_evaluation
from ..compression.checkpoint import (
    CALIBRATION_FILE,
    budget_request,
    kept_calibration,
    spend,
    write,
)
from ..compression.cost import duration
from ..compression.report import CompressionReport
from ..compression.run_key import run_key, text_digest
from ..config.choices import (
    DEFAULT_EFFORT,
    DEFAULT_SEED,
    ENGINES,
    Effort,
    Engine,
    Objective,
    StoredDtype,
    one_of,
    stored_dtype,
)
from ..data.text import TextOption, check_text, sources
from ..errors import ConfigError, DestinationError, NonFiniteError
from ..utils import validate
from ..utils.atomic_io import WholeFile, remove_leftovers, sole_run, storage_errors
from ..utils.engines import is_native
from ..utils.hub import StrPath, local_directory
from ..utils.progress import ProgressOption, announce
from ..utils.sizes import byte_count
from .measuring import Measured, Measuring
from .results import FIGURE_FILE, PLOT_FILE, SWEEP_FILE, SweepResult, SweepRow, read_sweep

# The folder of what is not finished, within that of the sweep.
_WORK = "work"
_SHARD = "5GB"


def sweep(
    source: StrPath,
    budgets: Sequence[Budget],
    out: StrPath,
    *,
    heldout: str | os.PathLike[str],
    text: TextOption | None = None,
    calibration: Calibration | StrPath | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    engine: Engine = "auto",
    device: str = "cpu",
    objective: Objective = "auto",
    matrices: Sequence[str] | None = None,
    max_macs: float | None = None,
    effort: Effort = DEFAULT_EFFORT,
    seed: int = DEFAULT_SEED,
    dtype: StoredDtype | None = None,
    context: int | None = None,
    stride: int | None = None,
    keep: StrPath | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> SweepResult:
    """Compresses the checkpoint in `source` to each of several budgets and measures quality, bytes and speed of each.

    There is one calibration, and the spectra of the matrices are computed once for all budgets. Quality is the
    perplexity of `heldout`, and of a model that is no causal language model the cosine of its embeddings with those of
    the original. Speed is that of one sequence: tokens that a language model writes, or that any other reads, a second.
    The models are removed once they are measured, unless `keep` says where they go.

    Args:
        source: A checkpoint, as for `compress_checkpoint`.
        budgets: The budgets, each as for `plan`, at least one and each once.
        out: The folder of the result: `sweep.json`, the figure `frontier.svg` and, where matplotlib is installed,
            `frontier.png`. It may exist if it is empty.
        heldout: The text to measure on: a str is the text itself, a `pathlib.Path` is a UTF-8 file. A warning says
            where it is among the texts of the calibration.
        text: The text to calibrate on, as for `calibrate_checkpoint`. Without it and a `calibration`, errors are
            measured in the Frobenius norm, and every model is far worse.
        calibration: In place of a text: a `Calibration` or its file.
        num_samples, seq_len, device: Of calibrating on `text`, as for `calibrate_checkpoint`; `device` also measures.
        engine: "auto" calibrates with torch where it is installed, and measures with the native runtime where that
            computes the family; "torch" and "native" do both.
        objective, matrices, max_macs, effort, seed, dtype: As for `compress_checkpoint`.
        context, stride: Of measuring a perplexity, as for `evaluate.perplexity`.
        keep: A folder that every model is kept in, under the name of its budget, with its scores in its model card.
        resume: Go on with the sweep in `out` that was stopped, which had the same arguments; begin anew where there is
            none. Budgets may differ: those that are finished are not repeated.
        threads: Worker threads. Default: one per core.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)`, called
            for each phase in turn.

    Returns:
        The rows, from the smallest budget to the largest, and the original.

    Raises:
        ConfigError: No budget, one that stands twice, is invalid, leaves the model as it is or cannot be met (the
            message has the smallest that can); `resume` finds a sweep with other arguments, which the message names.
        TextError: A text is empty or too short.
        DestinationError: `out` holds something else, or a sweep without `resume`, or is written by another run; a
            folder in `keep` exists.
        MissingDependencyError: The family needs torch, which is not installed.
        CheckpointError, ShapeError, NonFiniteError, DtypeError, StorageError: As `compress_checkpoint`.

    Every finished budget is in `sweep.json` at once, so that a killed sweep is resumed to the same table. Invalid
    arguments leave nothing in `out`.

    Cost: of the budgets together little more than of one, beside fitting and measuring each. The disk holds one
    compressed model at a time, the calibration on a `text`, and spectra beyond 512 MB in an unnamed temporary file.

    Example:
        >>> from pathlib import Path
        >>> tiny = "tests/data/tiny-gpt2"
        >>> text = "He looked at her, and she looked at the door."
        >>> result = sweep(tiny, [0.4, 0.6], "tiny-sweep", heldout=text, engine="native", progress=False)
        >>> [row.budget for row in result.rows], result.measure
        ([0.4, 0.6], 'perplexity')
    """
    # The arguments as they were given, for the commands in the cards.
    given = dict(locals())
    threads = validate.threads(threads)
    one_of("engine", engine, ENGINES)
    if text is not None and calibration is not None:
        raise ConfigError("expected a calibration or a text to calibrate on, got both")
    wanted = _distinct(budgets)
    stored, directory, folder = stored_dtype(dtype), local_directory(source), Path(out)
    known = load_calibration(calibration)
    # Each field is checked.
    spending = Spending(wanted[0], known, objective, matrices, max_macs, effort, seed, stored)
    native = is_native(engine, {"device": (device, "cpu")})
    check_text(heldout)
    checkpoint = _core.Checkpoint.open(directory)
    for budget in wanted:
        # Before a calibration on a text there are no moments, and so no objective.
        early = replace(spending, budget=budget, objective="auto" if text is not None else objective)
        _check_budget(checkpoint, early)
    _check_folder(folder, resume)
    places = _places(wanted, folder, keep)
    for place in places.values() if keep is not None else ():
        checkpoint.check_destination(os.fspath(place), resume)
    same = _same_text(text, heldout)
    if same is not None:
        warnings.warn(
            f"{same}: the held-out text is among the texts of the calibration: the figures look better than they are",
            stacklevel=2,
        )
    measuring = Measuring.of(
        directory,
        read_config(Path(directory)),
        engine,
        text=heldout,
        context=context,
        stride=stride,
        device=device,
        threads=threads,
    )
    sampling = {"num_samples": num_samples, "seq_len": seq_len, "engine": engine, "device": device}
    facts = {
        "calibration": known,
        "text": text,
        **(sampling if text is not None else {}),
        "heldout": text_digest(heldout),
        "measured by": measuring.engine,
        "device": device,
        "objective": objective,
        "matrices": matrix_patterns(matrices),
        "max_macs": max_macs,
        "effort": effort,
        "seed": seed,
        "dtype": stored,
        "context": context,
        "stride": stride,
    }
    run = json.loads(run_key(checkpoint, directory, facts))
    with _claimed(folder, resume) as earlier:
        if earlier is not None:
            _check_run(folder, earlier.run, run)
        result = SweepResult(
            version=_core.__version__,
            source=_core.source_name(directory),
            measure=measuring.measure,
            heldout=sources(heldout)[0][0],
            engine=measuring.engine,
            calibrated=objective != "frobenius" and (known is not None or text is not None),
            dense=None if earlier is None else earlier.dense,
            rows=() if earlier is None else earlier.rows,
            complete=False,
            run=run,
        )
        arguments = {name: value for name, value in given.items() if name in _ARGUMENTS}
        options = {"threads": threads, "progress": progress}
        work = _Work(checkpoint, directory, folder, places, keep is not None, resume, measuring, arguments, options)
        return work.run(result, wanted, spending, text, sampling, native=native)


# The arguments that `compress_checkpoint` has, too.
_ARGUMENTS = {
    "text",
    "calibration",
    "num_samples",
    "seq_len",
    "engine",
    "objective",
    "matrices",
    "max_macs",
    "effort",
    "seed",
    "dtype",
}


@dataclass
class _Work:
    """A sweep that holds the lock of its folder."""

    checkpoint: _core.Checkpoint
    source: str
    folder: Path
    places: Mapping[Budget, Path]
    keep: bool
    overwrite: bool
    measuring: Measuring
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    """The threads and the progress."""
    spectra: _core.SpectrumStore | None = None
    original: SweepRow | None = None
    dense_macs: int | None = None
    """MACs for one token of the matrices while they are dense, once a budget is planned."""

    def run(
        self,
        result: SweepResult,
        budgets: Sequence[Budget],
        spending: Spending,
        text: TextOption | None,
        sampling: Mapping[str, Any],
        *,
        native: bool,
    ) -> SweepResult:
        """Measures what `result` lacks of the budgets, and writes it whenever it grows."""
        progress = self.options["progress"]
        # A budget is the same however it is written.
        finished = {parsed(row.budget): row for row in result.rows if row.budget is not None}
        left = [
            budget
            for budget in budgets
            if parsed(budget) not in finished or (self.keep and not self.places[budget].exists())
        ]
        if result.dense is None:
            announce(progress, "measuring the original")
            result = replace(result, dense=self._measured_original())
            self._save(result)
        self.original = result.dense
        if left:
            if text is not None:
                calibration = kept_calibration(
                    self.folder / _WORK / CALIBRATION_FILE,
                    self.source,
                    text,
                    seed=spending.seed,
                    **sampling,
                    **self.options,
                )
                spending = replace(spending, calibration=calibration)
            # With the calibration at hand, before the first of them is compressed.
            for budget in left:
                _check_budget(self.checkpoint, replace(spending, budget=budget))
        begun = time.perf_counter()
        for done, budget in enumerate(left):
            row = self._measured(replace(spending, budget=budget), native=native)
            kept = finished.get(parsed(budget))
            # The figures of a finished budget stay, also where its model had to be made again.
            finished[parsed(budget)] = row if kept is None else kept
            dense = result.dense
            if dense is not None and dense.macs is None:
                dense = replace(dense, macs=self.dense_macs)
            result = replace(result, dense=dense, rows=_sorted(finished.values()))
            self._save(result)
            seconds = (time.perf_counter() - begun) / (done + 1) * (len(left) - done - 1)
            rest = f", {duration(seconds)} left" if seconds else ""
            figure = f"{result.measure} {row.quality:.4g}"
            announce(progress, f"budget {budget}: {figure}, {done + 1} of {len(left)} done{rest}")
        wanted = {parsed(budget) for budget in budgets}
        rows = tuple(row for row in result.rows if row.budget is not None and parsed(row.budget) in wanted)
        # Budgets of earlier runs stay in the file.
        result = replace(result, complete=True)
        self._save(result)
        self._draw(result)
        with storage_errors(self.folder / _WORK):
            shutil.rmtree(self.folder / _WORK, ignore_errors=True)
        return result if len(rows) == len(result.rows) else replace(result, rows=rows)

    def _measured_original(self) -> SweepRow:
        found = self.measuring(self.source, self.options["progress"])
        return _row(None, self.checkpoint.parameters, self.checkpoint.bytes, None, 0.0, found)

    def _measured(self, spending: Spending, *, native: bool) -> SweepRow:
        place = self.places[spending.budget]
        start = time.perf_counter()
        report, macs = self._compressed(spending, place, native=native)
        seconds = time.perf_counter() - start
        try:
            found = self.measuring(os.fspath(place), self.options["progress"])
        except NonFiniteError as error:
            raise NonFiniteError(f"budget {spending.budget}: {error}") from None
        row = _row(spending.budget, report.parameters_after, report.bytes_after or 0, macs, seconds, found)
        if not self.keep:
            with storage_errors(place):
                shutil.rmtree(place)
        elif self.measuring.measure == "perplexity":
            models = [
                _scored(place.name, row),
                *([] if self.original is None else [_scored("original", self.original)]),
            ]
            record_evaluation(place, {"models": models, "text": sources(self.measuring.text)[0][0]})
        return row

    def _compressed(self, spending: Spending, place: Path, *, native: bool) -> tuple[CompressionReport, int]:
        if not self.keep and place.exists():
            # A killed run left it.
            shutil.rmtree(place)
        journal = self.checkpoint.journal(os.fspath(place), "{}", resume=False, overwrite=self.overwrite)
        with closing(journal):
            if self.spectra is None:
                self.spectra = _core.SpectrumStore(len(budget_request(self.checkpoint, spending).names))
            request, spent = spend(self.checkpoint, spending, journal, spectra=self.spectra, **self.options)
            plan = request.plan(spent.choices)
            self.dense_macs = plan.macs_before
            report = write(
                self.checkpoint,
                self.source,
                journal,
                plan.config,
                list(zip(request.names, request.moments, strict=True)),
                spent,
                spending.calibration,
                given={**self.arguments, "budget": spending.budget},
                native=native,
                dtype=spending.dtype,
                overwrite=self.overwrite,
                max_shard_bytes=byte_count("max_shard_size", _SHARD),
                **self.options,
            )
        return report, plan.macs_after

    def _save(self, result: SweepResult) -> None:
        with WholeFile(self.folder / SWEEP_FILE) as file:
            file.write((result.to_json() + "\n").encode())

    def _draw(self, result: SweepResult) -> None:
        with WholeFile(self.folder / FIGURE_FILE) as file:
            file.write(result.to_svg().encode())
        if find_spec("matplotlib") is not None:
            # An infinite perplexity has no point.
            with suppress(NonFiniteError), storage_errors(self.folder / PLOT_FILE):
                result.plot().savefig(self.folder / PLOT_FILE, dpi=120)


def _row(
    budget: Budget | None, parameters: int, size: int, macs: int | None, seconds: float, found: Measured
) -> SweepRow:
    return SweepRow(budget, parameters, size, macs, found.quality, found.tokens_per_second, seconds, found.score)


def _scored(name: str, row: SweepRow) -> dict[str, Any]:
    """A row as a `ModelScore` has it."""
    return {"name": name, "parameters": row.parameters, "bytes": row.bytes, "text": dict(row.score)}


def _sorted(rows: Any) -> tuple[SweepRow, ...]:
    return tuple(sorted(rows, key=lambda row: (row.bytes, row.parameters, str(row.budget))))


def _distinct(budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets, each valid; raises `ConfigError` for none, and for one that stands twice."""
    given = [budgets] if isinstance(budgets, str | int | float) else list(budgets)
    if not given:
        raise ConfigError("budgets: expected at least one, got none")
    seen: dict[Any, Budget] = {}
    for budget in given:
        if (form := parsed(budget)) in seen:
            raise ConfigError(f"budgets: expected each once, got {seen[form]!r} and {budget!r}, which is the same")
        seen[form] = budget
    # Numbers of numpy have no form in JSON.
    return [
        budget if isinstance(budget, str) else int(budget) if form[0] == "parameters" else float(budget)
        for form, budget in seen.items()
    ]


def _check_budget(checkpoint: _core.Checkpoint, spending: Spending) -> None:
    """Raises `ConfigError` for a budget that cannot be met, or that leaves every matrix as it is."""
    request = budget_request(checkpoint, spending)
    most = request.limits["parameters"]
    before = sum(matrix.parameters_before for matrix in request.matrices)
    if most is not None and most >= before and spending.dtype != "int8":
        raise ConfigError(
            f"budget {spending.budget}: {meaning(spending.budget)}, which the model has as it is: nothing to compress"
        )


def _places(budgets: Sequence[Budget], folder: Path, keep: StrPath | None) -> dict[Budget, Path]:
    """The folder that the model of each budget is written to."""
    if keep is None:
        return dict.fromkeys(budgets, folder / _WORK / "compressed")
    if Path(keep).resolve() == folder.resolve():
        raise DestinationError(f"{keep}: expected another folder for the models than for the sweep")
    return {budget: Path(keep, _slug(budget)) for budget in budgets}


def _slug(budget: Budget) -> str:
    """A budget as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in ".-_=" else "_" for letter in str(budget))


def _same_text(text: TextOption | None, heldout: str | os.PathLike[str]) -> str | None:
    """The name of the text of a calibration that is the held-out one; None where it is none of them."""
    if text is None:
        return None
    digest = text_digest(heldout)
    entries = text if isinstance(text, list | tuple) else [text]
    return next((sources(entry)[0][0] for entry in entries if text_digest(entry) == digest), None)


def _check_run(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless a stopped sweep had the arguments of this one."""
    differing = [
        f"{name} was {earlier.get(name, 'not given')}, now {now.get(name, 'not given')}"
        for name in dict.fromkeys([*earlier, *now])
        if earlier.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(
            f"resume: the sweep in {folder} is another one: {'; '.join(differing)}. Resume it with what it had, "
            "or give another folder"
        )


def _check_folder(folder: Path, resume: bool) -> None:
    """Raises `DestinationError` for a folder of a sweep that holds something else, or a sweep without `resume`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DestinationError(f"{folder}: exists and is no folder")
    if (folder / SWEEP_FILE).exists():
        if not resume:
            raise DestinationError(f"{folder}: holds a sweep: resume goes on with it, or give another folder")
        return
    # A killed run leaves hidden files, and the folder of its work.
    if any(entry.name != _WORK and not entry.name.startswith(".") for entry in folder.iterdir()):
        raise DestinationError(f"{folder}: exists and holds no {SWEEP_FILE}: give an empty or a new folder")


@contextmanager
def _claimed(folder: Path, resume: bool) -> Iterator[SweepResult | None]:
    """Holds the lock of a sweep's folder; yields what an earlier run has finished, if there is one to be resumed.

    A folder in which nothing was finished is removed.
    """
    path = folder / SWEEP_FILE
    with sole_run(folder):
        # Again: another run may have filled it meanwhile.
        _check_folder(folder, resume)
        made = not folder.exists()
        if not made:
            remove_leftovers(folder)
        earlier = read_sweep(path) if path.exists() else None
        try:
            with storage_errors(folder):
                folder.mkdir(exist_ok=True)
                (folder / _WORK).mkdir(exist_ok=True)
            yield earlier
        finally:
            if not path.exists():
                shutil.rmtree(folder / _WORK, ignore_errors=True)
            with suppress(OSError):
                (folder / _WORK).rmdir()
            if made:
                with suppress(OSError):
                    folder.rmdir()
