"""`verify_checkpoint`: all checks of a checkpoint, one after the other, without pytest."""

from __future__ import annotations

from os import PathLike

from .._core import __version__
from ..config.choices import Dtype
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from .checks import CHECKS, Verification
from .results import CheckResult, VerificationReport
from .subject import Settings, Subject


def verify_checkpoint(
    source: StrPath,
    *,
    teacher: StrPath | None = None,
    text: str | PathLike[str] | None = None,
    max_perplexity_ratio: float = 1.1,
    min_cosine: float = 0.9,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    progress: ProgressOption = None,
) -> VerificationReport:
    """Checks a checkpoint before it is shipped, compressed or not; nothing is written.

    - `files`: `config.json` and the weight files are whole.
    - `finite`: every stored value is finite.
    - `permutations`: every stored permutation is one.
    - `tensors`: names and shapes of the tensors are those of `config.json`.
    - `fresh-process`: a fresh process loads it, and computes the same.
    - `size`: parameters and bytes are as `compression_report.json` or `training_report.json` says, and the specs of the
      former those of `config.json`.
    - `native`: the native runtime computes what torch does, for the families that it has.
    - `generation`: generation with the cache is that without, for models that generate.
    - `round-trip`: saving and loading changes no bit.
    - `perplexity`: of a causal language model, at most `max_perplexity_ratio` times the teacher's.
    - `embeddings`: of any other model of text, the mean cosine with the teacher's is at least `min_cosine`.

    A check that does not apply is skipped, with the reason; so are the last two without a teacher and a text. A check
    that builds on one that has failed is blocked: it is not measured. `pytest --pyargs tqcompressor.verify` runs the
    same checks, one a test.

    Args:
        source: The checkpoint: a directory with safetensors files, or a hub id.
        teacher: The checkpoint that it was made from.
        text: What quality is measured on: a str is the text itself, a `pathlib.Path` is a UTF-8 file. Text that neither
            calibration nor training has read says most.
        max_perplexity_ratio: The largest perplexity, as a multiple of the teacher's.
        min_cosine: The smallest mean cosine, as `evaluate.embedding_cosine` measures it.
        context: As in `evaluate.perplexity`, like `stride`.
        stride: Half of the context by default.
        batch_size: Windows, or texts, in one forward pass.
        dtype: The dtype to compute in. `round-trip` has the stored one.
        device: The torch device.
        progress: True, False, None (a bar when on a terminal or in a notebook) or a callable `(done, total)` in checks.

    Returns:
        Every check with its result and figures; `passed` says whether all that apply have passed, `str()` is a table.

    Raises:
        CheckpointError: `source` or `teacher` is not there.
        ConfigError: A bound is out of its range.
        TextError: The text is empty, or a file is not text.
        MissingDependencyError: torch or transformers is not installed.

    Cost: a few loads of the checkpoint, the disk for a copy of it, one model in memory and for the quality its teacher
    beside it, and `evaluate.perplexity` of both.

    Example:
        >>> report = verify_checkpoint("tests/data/tiny-gpt2", teacher="tests/data/tiny-gpt2", text="He looked at her.")
        >>> report.passed, report["perplexity"].figures["ratio"]
        (True, 1.0)
    """
    settings = Settings(
        source=source,
        teacher=teacher,
        text=text,
        max_perplexity_ratio=max_perplexity_ratio,
        min_cosine=min_cosine,
        context=context,
        stride=stride,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    verification = Verification(Subject(settings))
    results: list[CheckResult] = []
    with reporter(progress, "verify") as report:
        for check in CHECKS.values():
            results.append(verification.result(check))
            if report is not None:
                report(len(results), len(CHECKS))
    of_teacher = None if settings.teacher is None else str(settings.teacher)
    return VerificationReport(__version__, str(settings.source), of_teacher, tuple(results))
