"""Distillation from end to end: every stage compresses the student and trains it, with its state on disk.

`out/stages/N-NAME/compressed` is the student after the stage's compression, `checkpoints` are the trainer's, `trained`
is the student after the stage. Each gets its name only when it is complete. A killed run therefore resumes from the
last of them, and ends with the same weights as a run that was not killed. A lock keeps a second run out.

Of several processes, the first does all work that is done once, within `main_process_first`.
"""

from __future__ import annotations

import copy
import hashlib
import json
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
from ..compression.model import compress, recompress_planned
from ..config.choices import Dtype
from ..config.tq_config import TQConfig
from ..data.token_blocks import TokenBlocks
from ..errors import ConfigError
from ..evaluate.results import exponential
from ..evaluate.scoring import negative_log_likelihood
from ..utils.atomic_io import remove_leftovers, sole_run, whole_folder
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import on_device, quiet_transformers
from .artifacts import STATE, load_model, read_json, save_model, weights_digest, write_json
from .config import DistillConfig, TrainingConfig
from .prepare import Prepared, PreparedStage, prepare
from .report import REPORT_FILE, ModelResult, StageResult, TrainingReport
from .stages import DEFAULT_RECIPE, StagedRecipe
from .training import Trained, train_stage, training_arguments, training_settings


def distill(
    teacher: StrPath | PreTrainedModel,
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig = DEFAULT_RECIPE,
    *,
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
    """Compresses a GPT-2 and trains it to imitate the original model, its teacher.

    A recipe has one stage or several. Each stage decomposes the named matrices *of the current student*, and trains
    the student on its share of the text, every token once. The result in `out` is a compressed
    checkpoint with its tokenizer, a model card and `training_report.json`; `out/stages` has the student after every
    stage.

    For several processes, call it from a script under `torchrun` or `accelerate launch`, or launch the command line.

    Args:
        teacher: A checkpoint directory or hub id, or a live model, which needs `tokenizer` too.
        recipe: The name of one of `RECIPES` (a single stage) or `STAGED_RECIPES`, the path of a JSON file, a dict, a
            `StagedRecipe` or a `TQConfig`. One-shot "tq-81m" by default: on equal text it ends with a lower perplexity
            than "tq-81m-staged".
        text: The training text: a str is the text itself, a `Path` a UTF-8 file or a glob pattern, and a list holds
            either. A `datasets.Dataset` with a column "text" and a `TokenBlocks` are accepted too.
        out: The folder to write; it must not exist, or be empty, unless `resume`.
        tokenizer: By default the teacher's own.
        tokens: Tokens to train on, all stages together; by default all of the text.
        heldout: A text to measure perplexity on, a str or the `Path` of a file. By default the end of `text`, excluded
            from training: a hundredth of it, from one sample up to 65,536 tokens.
        losses: The loss of the student.
        training: Batches, optimiser and checkpoints of every stage: a `TrainingConfig` or, for any other setting, a
            `transformers.TrainingArguments`. Of the latter `output_dir`, `max_steps`, `save_total_limit` (at least 2),
            `dataloader_drop_last`, `remove_unused_columns` and `disable_tqdm` are set for every stage. Arguments that
            contradict a stage, such as `max_steps`, `num_train_epochs` other than 1, `eval_strategy`, or a
            `save_strategy` other than "steps", are refused. `logging_steps` is the step of the report's loss curve.
            Samples have `min(positions, 1024)` tokens; pass a `TokenBlocks` as `text` for another length.
        effort: "fast", "balanced" or "best", in place of the recipe's.
        seed: The seed of the permutation searches, in place of the recipe's. Training has the seed `training.seed`.
        device: "cpu" to train on the CPU even if there is a GPU; by default transformers chooses.
        dtype: The dtype of the result: "float32", "float16" or "bfloat16". Training is float32.
        cache: The folder of tokenised text, as in `token_blocks`.
        resume: Resumes a killed run that had the same arguments; starts a new run if `out` is empty. While the run
            is alive, a second one is refused.
        threads: Threads of the permutation search; they do not change the result.
        progress: True, False, None (bars when on a terminal or in a notebook) or a callable `(done, total)`, called
            for each piece of the work in turn.

    Returns:
        The scores of the teacher, of the one-shot student, and of the student before and after the training of every
        stage.

    Raises:
        ConfigError: Recipe, teacher, tokenizer and settings do not fit together, or `resume` finds a run with other
            arguments.
        TextError: Too little text for the stages, or files that are not UTF-8.
        DestinationError: `out` is not empty, another run is writing it, or `resume` finds files there and no run.
        StorageError: The disk is full, or has too little space for the stages.

    Cost: for every stage a compression, and on every token a forward and a backward pass of the student and a forward
    pass of the teacher. The disk holds two students for every stage, and two checkpoints of three times their size.

    Source: arXiv 2401.16367 (the stages); arXiv 1503.02531 (the losses).

    Example:
        >>> report = distill("gpt2", text=Path("openwebtext/*.txt"), out="gpt2-81m")  # doctest: +SKIP
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
        return finish(prepared, state, results)


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
            state = {"settings": settings, "heldout_tokens": len(prepared.heldout) - 1, "teacher": asdict(teacher)}
            # The compressed student of a single stage is the one-shot student, and is scored in the stage.
            if len(prepared.stages) > 1:
                student = copy.deepcopy(prepared.teacher)
                compress(student, prepared.one_shot, threads=prepared.threads, progress=prepared.progress)
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
    student = load_model(compressed)
    training = Trained((), 0.0, 0.0)
    if stage.samples is not None:
        training = train_stage(
            student,
            prepared.teacher,
            prepared.tokenizer,
            stage.samples,
            training_arguments(prepared.training, stage.folder / "checkpoints", stage.steps, prepared.device),
            prepared.losses,
            f"stage {stage.number}/{len(prepared.stages)} {stage.stage.name}",
            prepared.progress,
        )
    with prepared.arguments.main_process_first(local=False):
        if not trained.is_dir():
            result = StageResult(
                name=stage.stage.name,
                compressed=ModelResult(**start["compressed"]),
                trained=_score(prepared, student, f"score stage {stage.number}"),
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
    """Compresses the student of the previous stage, or the teacher, into `folder`."""
    if stage.number == 1:
        student = copy.deepcopy(prepared.teacher)
    else:
        student = load_model(prepared.stages[stage.number - 2].folder / "trained")
    report = recompress_planned(
        student, stage.stage.config, stage.plan, threads=prepared.threads, progress=prepared.progress
    )
    start = {
        "compressed": asdict(_score(prepared, student, f"score stage {stage.number}")),
        "lost_energy": {matrix.name: matrix.lost_energy for matrix in report.matrices},
    }
    with whole_folder(folder) as partial:
        save_model(student, prepared.tokenizer, partial)
        write_json(partial / "stage.json", start)


def _score(prepared: Prepared, model: PreTrainedModel, title: str) -> ModelResult:
    """Scores a model on the held-out text, on the device of the training, and moves it back to the CPU."""
    with on_device(prepared.arguments.device, model), reporter(prepared.progress, title) as report:
        total, tokens = negative_log_likelihood(model, prepared.heldout, progress=report or False)
    return ModelResult(model.num_parameters(), exponential(total / tokens))


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
                (partial / "README.md").write_text(report.model_card(), encoding="utf-8")
            for path in final.iterdir():
                path.replace(out / path.name)
            final.rmdir()
            for stage in prepared.stages:
                for done in ("compressed", "checkpoints"):
                    shutil.rmtree(stage.folder / done, ignore_errors=True)
            write_json(out / REPORT_FILE, report.to_dict())
    return report
