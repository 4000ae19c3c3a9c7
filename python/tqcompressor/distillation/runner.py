"""The whole of it: compress and train by turns, each stage from the student as it is then, its state on disk.

`out/stages/N-NAME/compressed` is the student after the stage's compression, `checkpoints` are its trainer's, `trained`
is the student after the stage. Each takes its name only when it is complete, so that a run that was killed goes on from
the last of them, and ends with the same weights as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .._core import __version__
from ..compression.model import compress, recompress
from ..compression.model_plan import plan_model
from ..config.tq_config import TQConfig
from ..data.text import read_text
from ..data.token_blocks import TokenBlocks, token_blocks
from ..errors import ConfigError, DestinationError, TextError
from ..evaluate.results import exponential
from ..evaluate.scoring import begin_tokens, negative_log_likelihood, token_sequence
from ..utils import validate
from ..utils.atomic_io import require_space, whole_folder
from ..utils.hub import StrPath
from ..utils.progress import ProgressOption, reporter
from ..utils.torch_utils import move
from .artifacts import load_model, read_json, save_model, weights_digest, write_json
from .config import PRECISIONS, DistillConfig, TrainingConfig
from .report import ModelResult, StageResult, TrainingReport
from .stages import Stage, StagedRecipe, resolve_staged_recipe
from .training import Trained, quiet_transformers, train_stage, training_arguments

_REPORT = "training_report.json"
_STATE = "training_state.json"
# Held out by default: a hundredth of the text, and no more than scoring it takes a while.
_HELDOUT_SHARE, _HELDOUT_TOKENS = 100, 1 << 16


def distill(
    teacher: StrPath | PreTrainedModel,
    recipe: StrPath | Mapping[str, Any] | StagedRecipe | TQConfig = "tq-81m-staged",
    *,
    texts: StrPath | Sequence[StrPath] | Any,
    out: StrPath,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int | None = None,
    heldout: StrPath | None = None,
    losses: DistillConfig | None = None,
    training: TrainingConfig | None = None,
    effort: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    cache: StrPath | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: ProgressOption = None,
) -> TrainingReport:
    """Compresses a GPT-2 stage by stage, and lets it learn from its teacher after every stage.

    Each stage decomposes the matrices that it names *as the student then has them*, and trains the student on its share
    of the text, every token once. The result in `out` is a compressed checkpoint with its tokenizer, a model card and
    `training_report.json`; `out/stages` has the student after every stage.

    Several processes: call it from a script under `torchrun` or `accelerate launch`, or start the command line so.

    Args:
        teacher: A checkpoint directory or hub id, or a live model (then `tokenizer` is needed too).
        recipe: The name of a staged recipe or of one of `RECIPES` (a single stage), the path of a JSON file, a dict, a
            `StagedRecipe` or a `TQConfig`.
        texts: To learn from: as for `token_blocks`.
        out: The folder to write; it must not exist, or be empty, unless `resume`.
        tokenizer: By default the teacher's own.
        tokens: Of training, for all stages together; by default all that the texts have.
        heldout: A UTF-8 text to measure perplexity on; by default the end of `texts`, which is then not trained on: a
            hundredth of it, from one block up to 65,536 tokens.
        losses: What the student learns from.
        training: Batches, optimiser, checkpoints.
        effort: "fast", "balanced" or "best", in place of the recipe's.
        seed: Of the permutation searches, in place of the recipe's.
        device: "cpu" to train there though there is a GPU; by default transformers chooses.
        dtype: Of the result: "float32", "float16" or "bfloat16". Training is float32.
        cache: Where tokenised texts are kept; as for `token_blocks`.
        resume: Go on where a run with the same arguments was killed; starts from the beginning where nothing is yet.
        threads: Threads of the permutation search.
        progress: True, False, None (bars when on a terminal or in a notebook) or a callable `(done, total)`, called
            for each piece of the work in turn.

    Returns:
        The ladder: teacher, one-shot, and the student before and after the training of every stage.

    Raises:
        ConfigError: Recipe, teacher, tokenizer and settings do not fit together, or `resume` finds another run's state.
        TextError: Too little text for the stages, or files that are not UTF-8.
        DestinationError: `out` is not empty.
        StorageError: The disk is full, or would become so.

    Source: arXiv 2401.16367 (the stages); arXiv 1503.02531 (the losses).

    Example:
        >>> report = distill("gpt2", texts=Path("openwebtext/*.txt"), out="gpt2-81m")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    training = training or TrainingConfig()
    threads = validate.threads(threads)
    run = _Run(Path(out), training, losses or DistillConfig(), device, threads, progress)
    if dtype not in PRECISIONS:
        raise ConfigError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    run.recipe = resolve_staged_recipe(recipe, effort=effort, seed=seed)
    run.check_destination(resume)
    with quiet_transformers():
        run.load_teacher(teacher, tokenizer)
        one_shot = run.one_shot_config()
        run.load_texts(texts, tokens, heldout, cache)
        run.check_space()
        run.begin(one_shot, dtype)
        stages = tuple(run.stage(number) for number in range(1, len(run.recipe.stages) + 1))
        return run.finish(stages, getattr(torch, dtype))


class _Run:
    """One distillation: what it was asked for, and where it stands."""

    recipe: StagedRecipe
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: list[TokenBlocks | None]
    steps: list[int]
    heldout: list[int]
    state: dict[str, Any]

    def __init__(
        self,
        out: Path,
        training: TrainingConfig,
        losses: DistillConfig,
        device: str | None,
        threads: int | None,
        progress: ProgressOption,
    ) -> None:
        self.out, self.training, self.losses = out, training, losses
        self.device, self.threads, self.progress = device, threads, progress
        # Made early: it knows of other processes, and refuses a precision that the machine does not have.
        self.arguments = training_arguments(training, self.out / "stages", 1, device)

    # What is asked for, checked before anything takes long.

    def check_destination(self, resume: bool) -> None:
        with self.arguments.main_process_first(local=False):
            taken = self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))
            if taken and not resume and self.arguments.process_index == 0:
                raise DestinationError(f"{self.out} exists and is not empty: choose another, or resume")

    def load_teacher(self, teacher: StrPath | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if isinstance(teacher, PreTrainedModel):
            if tokenizer is None:
                raise ConfigError("tokenizer: expected one along with a teacher that is a live model")
            # A copy, because it is moved about.
            self.teacher = copy.deepcopy(teacher)
            move(self.teacher, "cpu")
            self.teacher.to(torch.float32)  # type: ignore[arg-type]
        else:
            self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(teacher)
        vocabulary = self.teacher.config.vocab_size
        if len(self.tokenizer) > vocabulary:
            raise ConfigError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the teacher's vocabulary only {vocabulary}: "
                "it is another model's tokenizer"
            )
        positions = self.teacher.config.max_position_embeddings
        self.block_size = self.training.block_size or min(positions, 1024)
        if not 2 <= self.block_size <= positions:
            raise ConfigError(f"block_size: expected 2 to {positions} (the teacher's positions), got {self.block_size}")

    def one_shot_config(self) -> TQConfig:
        """All stages at once: each matrix as the last stage that names it has it. Checks that every stage fits."""
        specs: dict[str, Any] = {}
        for stage in self.recipe.stages:
            for matrix in plan_model(self.teacher, stage.config).matrices:
                specs[matrix.name] = matrix.spec
        return self.recipe.stages[-1].config.replace(specs=specs)

    def load_texts(self, texts: Any, tokens: int | None, heldout: StrPath | None, cache: StrPath | None) -> None:
        if heldout is not None:
            self.heldout = token_sequence(self.tokenizer, read_text(heldout))
        all_blocks = token_blocks(texts, self.tokenizer, self.block_size, cache=cache, progress=self.progress)
        available = len(all_blocks)
        if heldout is None:
            most = max(1, _HELDOUT_TOKENS // self.block_size)
            held_out = min(max(1, available // _HELDOUT_SHARE), most)
            available -= held_out
            rows = [all_blocks[available + index]["input_ids"].tolist() for index in range(held_out)]
            self.heldout = [*begin_tokens(self.tokenizer), *chain.from_iterable(rows)]
        wanted = available if tokens is None else tokens // self.block_size
        if wanted > available:
            raise TextError(
                f"tokens: {tokens:,} are asked for, the texts have {available * self.block_size:,} to train on"
            )
        per_step = self.training.batch_size * self.training.gradient_accumulation_steps * self.arguments.world_size
        self.blocks, self.steps = [], []
        for stage, share in zip(self.recipe.stages, self.recipe.blocks_of_stages(wanted), strict=True):
            if stage.share and len(share) < per_step:
                raise TextError(
                    f"stage {stage.name} has {len(share)} blocks of {self.block_size} tokens to train on, and a step "
                    f"takes {per_step}: give more text or smaller batches"
                )
            self.blocks.append(all_blocks.section(share.start, len(share)) if share else None)
            self.steps.append(len(share) // per_step)
        self.tokens_per_step = per_step * self.block_size

    def check_space(self) -> None:
        """At worst there are two students for each stage, two checkpoints with two moments each, and the result."""
        size = 4 * self.teacher.num_parameters()
        require_space(self.out, size * (2 * len(self.recipe.stages) + 2 * 3 + 1), "the stages and their checkpoints")

    # The work. What one process does for all is done within `main_process_first`, and found done by the others.

    def begin(self, one_shot: TQConfig, dtype: str) -> None:
        """Scores teacher and one-shot student, or finds that a run with the same settings did so."""
        settings = {
            "teacher": weights_digest(self.teacher),
            "recipe": self.recipe.to_dict(),
            "texts": [blocks and blocks.fingerprint for blocks in self.blocks],
            "heldout": hashlib.sha256(str(self.heldout).encode()).hexdigest(),
            "losses": asdict(self.losses),
            "training": {**asdict(self.training), "block_size": self.block_size},
            "processes": self.arguments.world_size,
            "dtype": dtype,
        }
        settings = json.loads(json.dumps(settings))
        path = self.out / _STATE
        with self.arguments.main_process_first(local=False):
            if not path.exists():
                teacher = self._score(self.teacher, "score teacher")
                state = {"settings": settings, "heldout_tokens": len(self.heldout) - 1, "teacher": asdict(teacher)}
                # The compression of a single stage is the one-shot one, and the stage scores it.
                if len(self.recipe.stages) > 1:
                    student = copy.deepcopy(self.teacher)
                    compress(student, one_shot, threads=self.threads, progress=self.progress)
                    state["one_shot"] = asdict(self._score(student, "score one-shot"))
                write_json(path, state)
            self.state = read_json(path)
        before = self.state["settings"]
        differing = [name for name in settings if before.get(name) != settings[name]]
        if differing:
            raise ConfigError(f"{self.out} is of a run with other settings ({', '.join(differing)}): it cannot go on")

    def stage(self, number: int) -> StageResult:
        """Does what is left to do of a stage."""
        stage, folder = self.recipe.stages[number - 1], self._folder(number)
        compressed, trained = folder / "compressed", folder / "trained"
        if trained.is_dir():
            return StageResult.from_dict(read_json(trained / "stage.json"))
        with self.arguments.main_process_first(local=False):
            if not compressed.is_dir():
                self._compress(stage, number, compressed)
        start = read_json(compressed / "stage.json")
        student = load_model(compressed)
        blocks, steps = self.blocks[number - 1], self.steps[number - 1]
        run = Trained((), 0.0, 0.0)
        if blocks is not None:
            run = train_stage(
                student,
                self.teacher,
                self.tokenizer,
                blocks,
                training_arguments(self.training, folder / "checkpoints", steps, self.device),
                self.losses,
                f"stage {number}/{len(self.recipe.stages)} {stage.name}",
                self.progress,
            )
        with self.arguments.main_process_first(local=False):
            if not trained.is_dir():
                result = StageResult(
                    name=stage.name,
                    compressed=ModelResult(**start["compressed"]),
                    trained=self._score(student, f"score stage {number}"),
                    lost_energy=start["lost_energy"],
                    tokens=steps * self.tokens_per_step,
                    steps=steps,
                    seconds=run.seconds,
                    tokens_per_second=run.tokens_per_second,
                    losses=run.losses,
                )
                with whole_folder(trained) as partial:
                    save_model(student, self.tokenizer, partial)
                    write_json(partial / "stage.json", asdict(result))
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return StageResult.from_dict(read_json(trained / "stage.json"))

    def finish(self, stages: tuple[StageResult, ...], dtype: torch.dtype) -> TrainingReport:
        """Puts the last stage's student into `out`; the report, which is written last, says that it is all there."""
        one_shot = self.state.get("one_shot")
        report = TrainingReport(
            version=__version__,
            settings=self.state["settings"],
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            heldout_tokens=self.state["heldout_tokens"],
            teacher=ModelResult(**self.state["teacher"]),
            one_shot=ModelResult(**one_shot) if one_shot else stages[0].compressed,
            stages=stages,
        )
        with self.arguments.main_process_first(local=False):
            if not (self.out / _REPORT).exists():
                final = self.out / "final"
                shutil.rmtree(final, ignore_errors=True)
                with whole_folder(final) as partial:
                    student: Any = load_model(self._folder(len(stages)) / "trained")
                    student.to(dtype)
                    save_model(student, self.tokenizer, partial)
                    (partial / "README.md").write_text(report.model_card(), encoding="utf-8")
                for path in final.iterdir():
                    path.replace(self.out / path.name)
                final.rmdir()
                for number in range(1, len(stages) + 1):
                    for done in ("compressed", "checkpoints"):
                        shutil.rmtree(self._folder(number) / done, ignore_errors=True)
                write_json(self.out / _REPORT, report.to_dict())
        return report

    def _compress(self, stage: Stage, number: int, folder: Path) -> None:
        student = copy.deepcopy(self.teacher) if number == 1 else load_model(self._folder(number - 1) / "trained")
        report = recompress(student, stage.config, threads=self.threads, progress=self.progress)
        start = {
            "compressed": asdict(self._score(student, f"score stage {number}")),
            "lost_energy": {matrix.name: matrix.lost_energy for matrix in report.matrices},
        }
        with whole_folder(folder) as partial:
            save_model(student, self.tokenizer, partial)
            write_json(partial / "stage.json", start)

    def _score(self, model: PreTrainedModel, title: str) -> ModelResult:
        move(model, self.arguments.device)
        with reporter(self.progress, title) as report:
            total, tokens = negative_log_likelihood(model, self.heldout, progress=report or False)
        move(model, "cpu")
        return ModelResult(model.num_parameters(), exponential(total / tokens))

    def _folder(self, number: int) -> Path:
        return self.out / "stages" / f"{number}-{self.recipe.stages[number - 1].name}"
