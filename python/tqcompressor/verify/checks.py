"""The checks of a checkpoint, each once: the command line, Python and pytest run these functions.

A check returns what it measured, or raises `Failed` or `NotApplicable`. A check that builds on others is not run where
one of these has failed: it is blocked, which is no proof either, and names the other.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core
from ..compression.report import REPORT_FILE, read_report
from ..data.text import open_text
from ..distillation.report import REPORT_FILE as TRAINING_REPORT_FILE
from ..distillation.report import TrainingReport
from ..errors import CheckpointError
from ..utils.torch_utils import quiet_transformers
from ..utils.utf8 import read_json
from .fresh import fingerprint, main
from .results import CheckResult, Status
from .subject import Subject, load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# The largest difference of two ways to compute one output, relative to the largest value, by the dtype of the model.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Names that a message lists at most.
_LISTED = 3
_NEW_TOKENS = 16
_PROMPT_TOKENS = 8
_ROWS, _POSITIONS = 2, 64


class Failed(Exception):
    """What a check claims does not hold; the message says where, what was expected and what came."""

    def __init__(self, message: str, **figures: float) -> None:
        super().__init__(message)
        self.figures = figures


class NotApplicable(Exception):
    """The check has no meaning for this checkpoint, or lacks an option; the message says why."""


@dataclass(frozen=True)
class Measured:
    """What a check has measured, in words and as figures."""

    text: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A check: what it claims, how it is measured, and the checks that must have passed before."""

    name: str
    claim: str
    measure: Callable[[Subject], Measured]
    needs: tuple[str, ...] = ()


class Verification:
    """The checks of one checkpoint; each is run once, whoever asks for it how often."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._results: dict[str, CheckResult] = {}

    def result(self, check: Check) -> CheckResult:
        """The result of a check, which runs those that it builds on first."""
        if check.name not in self._results:
            for name in check.needs:
                if self.result(CHECKS[name]).status in ("failed", "blocked"):
                    detail = f"not measured, as `{name}` has failed"
                    self._results[check.name] = CheckResult(check.name, check.claim, "blocked", detail, {}, 0.0)
                    break
            else:
                self._results[check.name] = self._run(check)
        return self._results[check.name]

    def _run(self, check: Check) -> CheckResult:
        start = time.perf_counter()
        measured = Measured("")
        status: Status = "passed"
        try:
            with quiet_transformers():
                measured = check.measure(self.subject)
        except NotApplicable as reason:
            status, measured = "skipped", Measured(str(reason))
        except Failed as failure:
            status, measured = "failed", Measured(str(failure), failure.figures)
        except Exception as error:
            # Whatever a checkpoint makes a library raise is a fault of the checkpoint, and no end of the verification.
            status, measured = "failed", Measured(_one_line(error))
        seconds = time.perf_counter() - start
        # JSON has no infinity and no NaN.
        figures = {name: figure for name, figure in measured.figures.items() if math.isfinite(figure)}
        return CheckResult(check.name, check.claim, status, measured.text, figures, seconds)


def _files(subject: Subject) -> Measured:
    from safetensors import SafetensorError, safe_open

    _ = subject.compression
    count = size = 0
    for file, promised in subject.weight_files.items():
        try:
            size += file.stat().st_size
            with safe_open(file, framework="np") as opened:
                stored = set(opened.keys())
        except OSError as error:
            raise Failed(f"{file}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise Failed(f"{file}: truncated or damaged, or not a safetensors file: {error}") from None
        if promised is not None and stored != set(promised):
            lacking, more = sorted(set(promised) - stored), sorted(stored - set(promised))
            raise Failed(f"{file}: {_list('missing by the index', lacking) or _list('not in the index', more)}")
        count += len(stored)
    files = len(subject.weight_files)
    text = f"{count} tensors in {files} file{'s' * (files > 1)}, {size:,} bytes"
    return Measured(text, {"tensors": count, "bytes": size})


def _finite(subject: Subject) -> Measured:
    count, faulty = 0, []
    for name, tensor in subject.tensors():
        if tensor.is_floating_point():
            count += 1
            wrong = tensor.numel() - int(tensor.isfinite().sum())
            if wrong:
                faulty.append(f"{name} ({wrong} of {tensor.numel()} values)")
    if faulty:
        raise Failed(_list("NaN or infinite", faulty))
    return Measured(f"{count} floating tensors", {"tensors": count})


def _permutations(subject: Subject) -> Measured:
    count = 0
    for name, tensor in subject.tensors():
        if name.endswith("_permutation"):
            count += 1
            order = tensor.flatten().sort().values
            if order.dtype.is_floating_point or order.tolist() != list(range(len(order))):
                outside = [int(value) for value in order if not 0 <= value < len(order)]
                why = f"{outside[0]} is not from 0 to {len(order) - 1}" if outside else "a number is there twice"
                raise Failed(f"{name}: not a permutation of {len(order)} indices: {why}")
    if not count:
        raise NotApplicable("nothing is permuted")
    return Measured(f"{count} permutations", {"permutations": count})


def _tensors(subject: Subject) -> Measured:
    loaded = subject.loaded
    for what, names in (
        ("missing from the files, as config.json has them", loaded.missing),
        ("of another shape than config.json says", loaded.mismatched),
    ):
        if names:
            raise Failed(_list(what, names))
    text = f"all tensors of a {type(loaded.model).__name__}"
    if loaded.unused:
        text += f"; {_list('stored, but not used', loaded.unused)}"
    return Measured(text, {"unused": len(loaded.unused)})


def _fresh_process(subject: Subject) -> Measured:
    settings = subject.settings
    here = fingerprint(subject.model)
    # The folder of this package, wherever this process has found it.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    code = f"from {main.__module__} import main; main()"
    command = [sys.executable, "-c", code, os.fspath(settings.source), settings.dtype, settings.device]
    start = time.perf_counter()
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    seconds = time.perf_counter() - start
    if run.returncode:
        raise Failed(f"exit status {run.returncode}: {_last_line(run.stderr)}")
    there = json.loads(_last_line(run.stdout))
    for name in ("class", "parameters", "bytes"):
        if here[name] != there[name]:
            raise Failed(f"{name}: {there[name]} in a fresh process, {here[name]} in this one")
    largest = _check_close(there["output"], here["output"], settings.dtype, "the output in a fresh process")
    return Measured(f"a {there['class']} with equal outputs", {"seconds": seconds, "difference": largest})


def _size(subject: Subject) -> Measured:
    from ..evaluate.comparison import model_size

    parameters, _ = model_size(subject.model)
    size = sum(file.stat().st_size for file in subject.weight_files)
    figures = {"parameters": float(parameters), "bytes": float(size)}
    counted = f"{parameters:,} parameters in {size:,} bytes"
    reports = []
    if (path := subject.directory / REPORT_FILE).exists():
        reports.append(REPORT_FILE)
        report = read_report(path)
        rows = sum(row.parameters_after for row in report.matrices) + sum(row.parameters for row in report.untouched)
        _equal(REPORT_FILE, "parameters_after", report.parameters_after, parameters)
        _equal(REPORT_FILE, "the parameters of all rows", rows, parameters)
        if report.bytes_after is not None:
            _equal(REPORT_FILE, "bytes_after", report.bytes_after, size)
        if subject.compression is not None:
            _equal_specs({row.name: row.spec for row in report.matrices}, dict(subject.compression.specs))
    if (path := subject.directory / TRAINING_REPORT_FILE).exists():
        reports.append(TRAINING_REPORT_FILE)
        try:
            trained = TrainingReport.from_dict(read_json(path)).stages[-1].trained.parameters
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Failed(f"{path}: not a report of a distillation: {error!r}") from None
        _equal(TRAINING_REPORT_FILE, "the parameters of the last stage", trained, parameters)
    if not reports:
        return Measured(f"{counted}, as config.json says; no report beside it", figures)
    return Measured(f"{counted}, as config.json and {' and '.join(reports)} say", figures)


def _native(subject: Subject) -> Measured:
    import torch

    from ..native.model import NativeModel

    if (refusal := _core.native_refusal(json.dumps(subject.config))) is not None:
        raise NotApplicable(refusal)
    if not subject.is_causal:
        raise NotApplicable(f"a {type(subject.model).__name__} has no language model's head")
    native = NativeModel.from_pretrained(subject.settings.source, progress=False)
    # The native runtime computes in float32.
    alike = subject.settings.dtype == "float32"
    model: Any = subject.model if alike else load(subject.settings.source, "float32", subject.settings.device).model
    ids = _tokens(native.vocab_size, _ROWS, min(native.context, _POSITIONS))
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False).logits
    largest = _check_close(native.logits(ids), expected.cpu().numpy(), "float32", "the native runtime's logits")
    text = f"logits of {ids.size} tokens within {largest:.1g} of the largest"
    return Measured(text, {"tokens": ids.size, "difference": largest})


def _generation(subject: Subject) -> Measured:
    import torch

    model: Any = subject.model
    if not model.can_generate():
        raise NotApplicable(f"a {type(model).__name__} does not generate")
    if model.main_input_name != "input_ids":
        raise NotApplicable(f"a {type(model).__name__} generates from {model.main_input_name}")
    context = getattr(model.config, "max_position_embeddings", None)
    context = context if isinstance(context, int) else 2 * _NEW_TOKENS
    prompt = max(1, min(_PROMPT_TOKENS, context // 2))
    new = min(_NEW_TOKENS, context - prompt)
    ids = torch.from_numpy(_tokens(int(model.config.vocab_size), 1, prompt)).to(model.device)
    with torch.inference_mode():
        with_cache, without = (
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                min_new_tokens=new,
                max_new_tokens=new,
                use_cache=cache,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=0,
            )
            for cache in (True, False)
        )
    rows = [torch.cat([logits.float() for logits in found.logits]) for found in (with_cache, without)]
    tokens = [found.sequences[0, -new:].tolist() for found in (with_cache, without)]
    same = next((step for step in range(new) if tokens[0][step] != tokens[1][step]), new)
    # Up to the first different token both have read the same. If rounding alone made it different, the logits agree.
    compared = min(same + 1, new)
    largest = _check_close(
        rows[0][:compared].cpu(), rows[1][:compared].cpu(), subject.settings.dtype, "the logits with the cache"
    )
    text = f"{new} tokens, their logits within {largest:.1g} of the largest"
    return Measured(text, {"tokens": new, "difference": largest})


def _round_trip(subject: Subject) -> Measured:
    first = load(subject.settings.source, "auto", "cpu").model
    before = first.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        after = load(folder, "auto", "cpu").model.state_dict()
        different = sorted(before.keys() ^ after.keys())
        if different:
            raise Failed(_list("in the model before or after saving alone", different))
        for name, tensor in before.items():
            if not _same_bits(tensor, after[name]):
                raise Failed(f"{name}: other bits after saving and loading")
        del after
    return Measured(f"{len(before)} tensors, bit for bit", {"tensors": len(before)})


def _perplexity(subject: Subject) -> Measured:
    from ..evaluate.scoring import perplexity

    settings = subject.settings
    if not subject.is_causal:
        raise NotApplicable(f"a {type(subject.model).__name__} does not predict the next token: see `embeddings`")
    text = _text_of_quality(subject)
    options: Any = {"context": settings.context, "stride": settings.stride, "batch_size": settings.batch_size}
    found = perplexity(subject.model, subject.tokenizer, text, **options, progress=False)
    expected = perplexity(_teacher(subject), subject.teacher_tokenizer, text, **options, progress=False)
    if found.tokens != expected.tokens:
        raise Failed(
            f"the tokenizer gives the text {found.tokens:,} tokens, the teacher's {expected.tokens:,}: perplexities "
            "are comparable with one tokenizer only"
        )
    ratio = found.perplexity / expected.perplexity
    words = f"{found.perplexity:.2f}, the teacher's {expected.perplexity:.2f}: ratio {ratio:.4f}"
    figures = {"perplexity": found.perplexity, "teacher": expected.perplexity, "ratio": ratio}
    # Written so that NaN fails.
    if not ratio <= settings.max_perplexity_ratio:
        raise Failed(f"{words}, expected at most {settings.max_perplexity_ratio:g}", **figures)
    return Measured(f"{words}, at most {settings.max_perplexity_ratio:g}", figures)


def _embeddings(subject: Subject) -> Measured:
    from ..evaluate.embeddings import embedding_cosine

    settings = subject.settings
    if subject.is_causal:
        raise NotApplicable("a causal language model: see `perplexity`")
    if subject.model.main_input_name != "input_ids":
        raise NotApplicable(f"a {type(subject.model).__name__} reads {subject.model.main_input_name}, not text")
    text, tokenizer = _text_of_quality(subject), subject.teacher_tokenizer
    sample = next(line for parts in open_text(text) for part in parts for line in part.splitlines() if line.strip())
    if tokenizer(sample)["input_ids"] != subject.tokenizer(sample)["input_ids"]:
        raise Failed(f"the tokenizer gives {sample[:40]!r} other tokens than the teacher's")
    found = embedding_cosine(
        subject.model, _teacher(subject), tokenizer, text, batch_size=settings.batch_size, progress=False
    )
    words = f"cosine {found.cosine:.4f} over {found.texts} texts, the smallest {found.smallest:.4f}"
    figures = {"cosine": found.cosine, "smallest": found.smallest, "texts": found.texts}
    if not found.cosine >= settings.min_cosine:
        raise Failed(f"{words}, expected at least {settings.min_cosine:g}", **figures)
    return Measured(f"{words}, at least {settings.min_cosine:g}", figures)


_READABLE = ("files", "finite", "permutations")
_LOADABLE = (*_READABLE, "tensors")
CHECKS = {
    check.name: check
    for check in (
        Check("files", "config.json and the weight files are whole", _files),
        Check("finite", "every stored value is finite", _finite, ("files",)),
        Check("permutations", "every stored permutation is one", _permutations, ("files",)),
        Check("tensors", "names and shapes of the tensors are those of config.json", _tensors, _READABLE),
        Check("fresh-process", "a fresh process loads it and computes the same", _fresh_process, _LOADABLE),
        Check("size", "parameters and bytes are as reported", _size, _LOADABLE),
        Check("native", "the native runtime computes what torch does", _native, _LOADABLE),
        Check("generation", "generation with the cache is that without", _generation, _LOADABLE),
        Check("round-trip", "saving and loading changes no bit", _round_trip, _LOADABLE),
        Check("perplexity", "the perplexity is within the bound of the teacher's", _perplexity, _LOADABLE),
        Check("embeddings", "embeddings of texts are close to the teacher's", _embeddings, _LOADABLE),
    )
}


def _text_of_quality(subject: Subject) -> Any:
    """The text that quality is measured on; raises `NotApplicable` without it or without a teacher."""
    given = {"teacher": subject.settings.teacher, "text": subject.settings.text}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise NotApplicable(f"needs a {' and a '.join(missing)}")
    return given["text"]


def _teacher(subject: Subject) -> PreTrainedModel:
    try:
        return subject.load_teacher()
    except Exception as error:
        raise Failed(f"the teacher does not load: {_one_line(error)}") from error


def _tokens(vocab_size: int, rows: int, positions: int) -> Any:
    """Fixed tokens, of the whole vocabulary."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, positions))


def _check_close(found: Any, expected: Any, dtype: str, what: str) -> float:
    """The largest difference as a share of the largest value; raises `Failed` where it is beyond rounding."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise Failed(f"{what}: expected the shape {expected.shape}, got {found.shape}")
    if not expected.size:
        return 0.0
    largest = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), math.ulp(1.0)))
    if not largest <= _TOLERANCE[dtype]:
        raise Failed(
            f"{what}: expected a difference of at most {_TOLERANCE[dtype]:g} of the largest, got {largest:.2g}"
        )
    return largest


def _same_bits(first: Tensor, second: Tensor) -> bool:
    import torch

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def _equal(file: str, name: str, said: int, found: int) -> None:
    if said != found:
        raise Failed(f"{file}: {name}: expected {found:,} as in the checkpoint, got {said:,}")


def _equal_specs(reported: dict[str, Any], configured: dict[str, Any]) -> None:
    for name in [*configured, *reported]:
        if reported.get(name) != configured.get(name):
            says = [str(specs.get(name, "nothing")) for specs in (configured, reported)]
            raise Failed(f"{REPORT_FILE}: {name}: expected {says[0]} as in config.json, got {says[1]}")


def _list(what: str, names: Sequence[str]) -> str:
    """The first few of some names behind what is wrong with them; nothing where there are none."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {', '.join(names[:_LISTED])}{more}" if names else ""


def _one_line(error: Exception) -> str:
    text = _first(str(error).splitlines())
    return text if isinstance(error, CheckpointError) and text else f"{type(error).__name__}: {text}"


def _last_line(text: str) -> str:
    return _first(reversed(text.splitlines())) or "no message"


def _first(lines: Iterable[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")
