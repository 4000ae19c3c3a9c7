"""Distillation from end to end: every stage compresses the student and trains it, with its state on disk.

`out/stages/N-NAME/compressed` is the student after the stage's compression, with its calibration, `checkpoints` are the
trainer's, `trained` is the student after the stage. Each gets its name only when it is complete. A killed run therefore
resumes from the last of them, and ends with the same weights as a run that was not killed. A lock keeps a second run
out.

Of several processes, the first does all work that is done once, within `main_process_first`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from .._core import __version__
from ..calibration.calibrate import calibrate
from ..calibration.calibration import Calibration
from ..compression.budget import Budget
from ..compression.card import CARD_FILE, source_of
from ..compression.model import compress, recompress_planned
from ..compression.report import CompressionReport, MatrixReport
from ..compression.run_key import calibration_digest
from ..config.choices import Dtype
from ..config.tq_config import TQConfig
from ..data.token_blocks import TokenBlocks
from ..data.tokenize import CALIBRATION_SEQ_LEN
from ..errors import ConfigError
from ..models.balancing import MomentsOf, has_low_rank
from ..models.matrices import compressed_modules
from ..utils.atomic_io import remove_leftovers, sole_run, whole_folder
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, Report, reporter
from ..utils.torch_utils import on_device, quiet_transformers
from .artifacts import STATE, load_model, read_json, save_model, weights_digest, write_json
from .config import DistillConfig, TrainingConfig
from .prepare import Prepared, PreparedStage, prepare
from .report import REPORT_FILE, ModelResult, StageResult, TrainingReport
from .stages import Stage, StagedRecipe
from .training import Trained, train_stage, training_arguments, training_settings

_LOGGER = logging.getLogger(__name__)
_CALIBRATION = "calibration.safetensors"


def distill(
    teacher: StrPath | PreTrainedModel,
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig | None = None,
    *,
    budget: Budget | None = None,
    student: StrPath | PreTrainedModel | None = None,
    calibration: Calibration | StrPath | None = None,
    num_samples: int = 128,
    refine: bool = False,
    text: str | Path | Sequence[str | Path] | TokenBlocks | Any,
    out: StrPath,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int | None = None,
    heldout: str | Path | None = None,
    losses: DistillConfig | None = None,
    training: TrainingConfig | TrainingArguments | None = None,
    effort: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    cache: StrPath | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> TrainingReport:
    """Compresses a model and trains it to imitate the original, its teacher; or trains a student that is there.

    The teacher is a causal or masked language model, or a text encoder, which learns the embeddings of texts. A budget
    is spent by a calibration on the training text. A recipe has one stage or several. Each stage compresses *the
    current student*, and trains it on its share of the text, every token once. No stage ends worse than it began: the
    student is scored on held-out text at every checkpoint, and the best is kept. While they learn, low-rank factors
    are plain products, balanced in the norm of the calibration; see `modules.balanced`.

    The result in `out` is a compressed checkpoint with its tokenizer, a model card and `training_report.json`;
    `out/stages` has the student after every stage.

    For several processes, call it from a script under `torchrun` or `accelerate launch`, or launch the command line.

    Args:
        teacher: A checkpoint directory or hub id, or a live model, which needs `tokenizer` too.
        recipe: The name of one of `RECIPES` (a single stage) or `STAGED_RECIPES`, the path of a JSON file, a dict, a
            `StagedRecipe` or a `TQConfig`. `StagedRecipe.of_budgets` makes stages of budgets.
        budget: In place of a recipe: the size to keep, as for `compress`; one stage. Default: 0.65, unless there is a
            recipe or a student.
        student: In place of both: a checkpoint or live model of the teacher's class, compressed or not, to train.
        calibration: Of the teacher, for the first budget, or of either, to balance the factors of a student; by default
            it is measured on the text. Later stages calibrate the student that they compress.
        num_samples: Sequences of 128 tokens that a calibration reads.
        refine: Whether the factors that a budget leaves are first trained on these sequences as by
            `compress(refine=True)`, a few blocks at a time: fewer tokens are then needed for the same quality.
        text: The training text: a str is the text itself, a `Path` a UTF-8 file or a glob pattern, and a list holds
            either. A `datasets.Dataset` with a column "text" and a `TokenBlocks` are accepted too.
        out: The folder to write; it must not exist, or be empty, unless `resume`.
        tokenizer: By default the teacher's own.
        tokens: Tokens to train on, all stages together, drawn from every part of the text; by default all of it.
        heldout: A text to score on, a str or the `Path` of a file. By default the end of `text`, excluded
            from training: a hundredth of it, from one sample up to 65,536 tokens.
        losses: The loss of the student.
        training: Batches, optimiser and checkpoints of every stage: a `TrainingConfig` or, for any other setting, a
            `transformers.TrainingArguments`. Of the latter `output_dir`, `max_steps`, `save_total_limit` (at least 2),
            `dataloader_drop_last`, `remove_unused_columns` and `disable_tqdm` are set for every stage. Arguments that
            contradict a stage, such as `max_steps`, `num_train_epochs` other than 1, `eval_strategy`, or a
            `save_strategy` other than "steps", are refused. `logging_steps` is the step of the report's loss curve.
            Samples have `min(positions, 1024)` tokens; pass a `TokenBlocks` as `text` for another length.
        effort: "fast", "balanced" or "best", in place of the recipe's.
        seed: The seed of searches and calibrations, in place of the recipe's. Training has the seed `training.seed`.
        device: "cpu" to train on the CPU even if there is a GPU; by default transformers chooses.
        dtype: The dtype of the result: "float32", "float16" or "bfloat16". Training is float32.
        cache: The folder of tokenised text, as in `token_blocks`.
        resume: Resumes a killed run that had the same arguments; starts a new run if `out` is empty. While the run
            is alive, a second one is refused.
        threads: Threads of the compression; they do not change the result.
        progress: True, False, None (bars when on a terminal or in a notebook) or a callable `(done, total)`, called
            for each piece of the work in turn.

    Returns:
        The scores of the teacher, of the student without training, and of the student before and after the training of
        every stage.

    Raises:
        ConfigError: Recipe, teacher, student, tokenizer and settings do not fit together, or `resume` finds a run with
            other arguments.
        TextError: Too little text for the stages, or files that are not UTF-8.
        DestinationError: `out` is not empty, another run is writing it, or `resume` finds files there and no run.
        StorageError: The disk is full, or has too little space for the stages.

    Cost: for every stage a compression, with a budget a calibration, and on every token a forward and a backward pass
    of the student and a forward pass of the teacher. The disk holds two students for every stage, and two checkpoints
    of three times their size.

    Source: arXiv 2401.16367 (the stages); arXiv 1503.02531 (the losses).

    Example:
        >>> report = distill("gpt2", budget=0.65, text=Path("openwebtext/*.txt"), out="gpt2-65")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    training = training or TrainingConfig()
    # Create it early: it starts the communication between processes and rejects settings that the machine lacks.
    arguments = training_arguments(training, Path(out) / "stages", 1, device)
    alone = sole_run(Path(out)) if arguments.process_index == 0 else nullcontext()
    with quiet_transformers(), alone:
        prepared = prepare(
            teacher,
            recipe,
            budget=budget,
            student=student,
            calibration=calibration,
            num_samples=num_samples,
            refine=refine,
            text=text,
            out=out,
            tokenizer=tokenizer,
            tokens=tokens,
            heldout=heldout,
            losses=losses or DistillConfig(),
            training=training,
            arguments=arguments,
            effort=effort,
            seed=seed,
            device=device,
            dtype=dtype,
            cache=cache,
            resume=resume,
            threads=threads,
            progress=progress,
        )
        state = begin(prepared)
        results = tuple(run_stage(prepared, stage) for stage in prepared.stages)
        report = finish(prepared, state, results)
    if arguments.process_index == 0:
        _LOGGER.info("written to %s", os.fspath(out))
    return report


def begin(prepared: Prepared) -> Mapping[str, Any]:
    """Scores teacher and one-shot student, or reads their scores when a run is resumed. Returns the state of the run.

    Raises `ConfigError` if `out` has the state of a run with other settings.
    """
    settings = _settings(prepared)
    path = prepared.out / STATE
    with prepared.arguments.main_process_first(local=False):
        if prepared.arguments.process_index == 0:
            remove_leftovers(prepared.out)
        if not path.exists():
            teacher = _score(prepared, prepared.teacher, "score teacher")
            state = {"settings": settings, "heldout_tokens": len(prepared.heldout), "teacher": asdict(teacher)}
            # The compressed student of a single stage is the one-shot student, and is scored in the stage.
            if len(prepared.stages) > 1:
                student = copy.deepcopy(prepared.teacher)
                if prepared.one_shot is not None:
                    compress(student, prepared.one_shot, threads=prepared.threads, progress=prepared.progress)
                else:
                    last = [stage.stage for stage in prepared.stages if stage.stage.budget is not None][-1]
                    _spend(prepared, student, last, _of_teacher(prepared, last.seed), refine=False)
                state["one_shot"] = asdict(_score(prepared, student, "score one-shot"))
            write_json(path, state)
    found: Mapping[str, Any] = read_json(path)
    differing = [name for name in settings if found["settings"].get(name) != settings[name]]
    if differing:
        raise ConfigError(
            f"{prepared.out} has a run with other settings ({', '.join(differing)}): resume it with its own, or "
            "choose another folder"
        )
    return found


def _settings(prepared: Prepared) -> dict[str, Any]:
    """All settings that affect the result, as JSON types."""
    settings = {
        "teacher": weights_digest(prepared.teacher),
        "recipe": prepared.recipe.to_dict(),
        "student": prepared.student and weights_digest(prepared.student),
        "calibration": [prepared.num_samples, prepared.calibration and calibration_digest(prepared.calibration)],
        "refine": prepared.refine,
        "text": [stage.samples and stage.samples.fingerprint for stage in prepared.stages],
        "heldout": hashlib.sha256(str(list(prepared.heldout)).encode()).hexdigest(),
        "losses": asdict(prepared.losses),
        "training": training_settings(prepared.training, prepared.seq_len),
        "processes": prepared.arguments.world_size,
        "dtype": prepared.dtype,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def run_stage(prepared: Prepared, stage: PreparedStage) -> StageResult:
    """Runs the missing steps of a stage: compressing, training and scoring the student."""
    compressed, trained = stage.folder / "compressed", stage.folder / "trained"
    if trained.is_dir():
        return _read_result(trained)
    with prepared.arguments.main_process_first(local=False):
        if not compressed.is_dir():
            _compress(prepared, stage, compressed)
    start = read_json(compressed / "stage.json")
    before = ModelResult(**start["compressed"])
    student = load_model(compressed)
    training = Trained((), 0.0, 0.0, 0)
    after = before
    if stage.samples is not None:
        training = train_stage(
            student,
            prepared.teacher,
            prepared.tokenizer,
            prepared.task.samples(stage.samples),
            training_arguments(prepared.training, stage.folder / "checkpoints", stage.steps, prepared.device),
            prepared.losses,
            f"stage {stage.number}/{len(prepared.stages)} {stage.stage.name}",
            prepared.progress,
            score=lambda model: _score_of(prepared, model, None),
            start=before.score,
            moments=_moments(compressed),
        )
    with prepared.arguments.main_process_first(local=False):
        if not trained.is_dir():
            if training.step > 0:
                after = _score(prepared, student, f"score stage {stage.number}")
            else:
                student = load_model(compressed)
            result = StageResult(
                name=stage.stage.name,
                compressed=before,
                trained=after,
                kept_step=training.step,
                lost_energy=start["lost_energy"],
                tokens=stage.steps * prepared.tokens_per_step,
                steps=stage.steps,
                seconds=training.seconds,
                tokens_per_second=training.tokens_per_second,
                losses=training.losses,
            )
            with whole_folder(trained) as partial:
                save_model(student, prepared.tokenizer, partial)
                write_json(partial / "stage.json", asdict(result))
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
    return _read_result(trained)


def _read_result(trained: Path) -> StageResult:
    return StageResult.from_dict(read_json(trained / "stage.json"))


def _compress(prepared: Prepared, stage: PreparedStage, folder: Path) -> None:
    """Compresses the student of the previous stage, or the first one, into `folder`."""
    student: Any
    if stage.number == 1:
        student = copy.deepcopy(prepared.student or prepared.teacher)
    else:
        student = load_model(prepared.stages[stage.number - 2].folder / "trained")
    calibration: Calibration | None = None
    matrices: Sequence[MatrixReport] = ()
    if stage.plan is not None and stage.stage.config is not None:
        options: dict[str, Any] = {"threads": prepared.threads, "progress": prepared.progress}
        matrices = recompress_planned(student, stage.stage.config, stage.plan, **options).matrices
    elif stage.stage.budget is not None:
        if next(compressed_modules(student), None) is not None:
            student.dequantize()
        seed = stage.stage.seed
        calibration = _of_teacher(prepared, seed) if stage.number == 1 else _calibrated(prepared, student, seed)
        matrices = _spend(prepared, student, stage.stage, calibration, refine=prepared.refine).matrices
    if calibration is None and stage.samples is not None and has_low_rank(student):
        given = prepared.calibration if stage.number == 1 else None
        calibration = given or _calibrated(prepared, student, stage.stage.seed)
    start = {
        "compressed": asdict(_score(prepared, student, f"score stage {stage.number}")),
        "lost_energy": {matrix.name: matrix.lost_energy for matrix in matrices},
    }
    with whole_folder(folder) as partial:
        save_model(student, prepared.tokenizer, partial)
        if calibration is not None:
            calibration.save(partial / _CALIBRATION)
        write_json(partial / "stage.json", start)


def _spend(
    prepared: Prepared, student: PreTrainedModel, stage: Stage, calibration: Calibration, *, refine: bool
) -> CompressionReport:
    """Compresses a dense student by the budget of a stage."""
    with on_device(prepared.arguments.device, student) if refine else nullcontext():
        return compress(
            student,
            budget=stage.budget,
            calibration=calibration,
            refine=_drawn(prepared, stage.seed) if refine else False,
            effort=stage.effort,
            seed=stage.seed,
            threads=prepared.threads,
            progress=prepared.progress,
        )


def _calibrated(prepared: Prepared, student: PreTrainedModel, seed: int) -> Calibration:
    """The calibration of a student on the text of the training."""
    with on_device(prepared.arguments.device, student):
        return calibrate(student, _drawn(prepared, seed), seed=seed, progress=prepared.progress)


def _drawn(prepared: Prepared, seed: int) -> list[torch.Tensor]:
    return list(prepared.task.drawn(prepared.calibration_text, prepared.num_samples, CALIBRATION_SEQ_LEN, seed))


def _of_teacher(prepared: Prepared, seed: int) -> Calibration:
    """The calibration of the teacher: the one that was given, or one that is measured once in a run, also if killed."""
    if prepared.calibration is not None:
        return prepared.calibration
    path = prepared.out / "stages" / f"{seed}.{_CALIBRATION}"
    if not path.exists():
        _calibrated(prepared, prepared.teacher, seed).save(path)
    return Calibration.load(path)


def _moments(compressed: Path) -> MomentsOf | None:
    """The norm of a stage's calibration; None for a student without low-rank factors."""
    if not (compressed / _CALIBRATION).exists():
        return None
    calibration = Calibration.load(compressed / _CALIBRATION)
    return lambda matrix: (calibration.input(matrix), calibration.output(matrix))


def _score(prepared: Prepared, model: PreTrainedModel, title: str) -> ModelResult:
    """Scores a model on the held-out text, on the device of the training, and moves it back to the CPU."""
    with on_device(prepared.arguments.device, model, prepared.teacher):
        return ModelResult(model.num_parameters(), _score_of(prepared, model, title))


def _score_of(prepared: Prepared, model: PreTrainedModel, title: str | None) -> float:
    """The score of a model that is on the device of the training, as the teacher is; without a title no progress."""
    with reporter(False if title is None else prepared.progress, title or "") as report:
        silent: Report = lambda done, total: None  # noqa: E731
        return prepared.task.score(model, prepared.teacher, prepared.heldout, prepared.seq_len, report or silent)


def finish(prepared: Prepared, state: Mapping[str, Any], results: tuple[StageResult, ...]) -> TrainingReport:
    """Puts the last stage's student into `out`. The report is written last, so that it marks a complete result."""
    one_shot = state.get("one_shot")
    report = TrainingReport(
        version=__version__,
        settings=state["settings"],
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        measure=prepared.task.measure,
        heldout_tokens=state["heldout_tokens"],
        teacher=ModelResult(**state["teacher"]),
        one_shot=ModelResult(**one_shot) if one_shot else results[0].compressed,
        stages=results,
    )
    out = prepared.out
    with prepared.arguments.main_process_first(local=False):
        if not (out / REPORT_FILE).exists():
            final = out / "stages" / "final"
            shutil.rmtree(final, ignore_errors=True)
            with whole_folder(final) as partial:
                student: Any = load_model(prepared.stages[-1].folder / "trained")
                student.to(getattr(torch, prepared.dtype))
                save_model(student, prepared.tokenizer, partial)
                source = source_of(prepared.teacher.name_or_path)
                (partial / CARD_FILE).write_text(report.model_card(source), encoding="utf-8")
            for path in final.iterdir():
                path.replace(out / path.name)
            final.rmdir()
            for path in (out / "stages").glob(f"*.{_CALIBRATION}"):
                path.unlink()
            for stage in prepared.stages:
                for done in ("compressed", "checkpoints"):
                    shutil.rmtree(stage.folder / done, ignore_errors=True)
            write_json(out / REPORT_FILE, report.to_dict())
    return report
