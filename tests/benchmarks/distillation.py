"""Held-out perplexity of distilled students against their rivals, all trained on the same tokens, over several seeds.

The teacher is the small GPT-2 of this repository; the students have about 65% of its parameters. Rivals:

- staged, distilled: the stages of `tq-81m-staged`, with a milder last one, so that 65% are left and not 60%;
- one-shot, distilled: the same shapes in one step, then the same training;
- staged, labels alone: the same stages, trained on the next token without the teacher;
- budget, one-shot and budget, staged: `--budget` of the parameters, calibrated on the text, in one stage or in three,
  trained with the defaults of `distill`;
- from scratch: a narrower dense GPT-2 of as many parameters, random weights, trained on the next token.

Budgets are in tokens; 567,000 is 3.1% of what the teacher was trained on. The text is not in the repository: pass yours
as `--text` (default: the books that the teacher was trained on, if present). Each run takes minutes.

`--model DIR` heals SmolLM2-135M instead, on `--text` and WikiText-2; see `healing.py`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import healing
import torch
from measuring import ROOT, lines_of_fresh_process
from quality_data import DATA
from tqcompressor import KroneckerSpec, TQConfig, compress, token_blocks
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.runner import distill
from tqcompressor.distillation.stages import STAGED_RECIPES, Stage, StagedRecipe
from tqcompressor.distillation.trainer import DistillTrainer
from tqcompressor.distillation.training import training_arguments
from tqcompressor.evaluate import perplexity, read_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PrinterCallback

TEACHER = ROOT / "tests" / "data" / "tiny-gpt2"
BOOKS = DATA / "books" / "train.txt"
TEACHER_TOKENS = 18_300_000
# `distill` scores on this beginning of the text after every stage; the table scores on the whole text.
GLANCE_CHARACTERS = 20_000

PUBLISHED = STAGED_RECIPES["tq-81m-staged"].stages
STAGED = StagedRecipe(
    (
        *PUBLISHED[:2],
        Stage("embedding-again", TQConfig({"wte": KroneckerSpec((1, 8), 3, "columns")}, effort="balanced")),
    )
)
ONE_SHOT = TQConfig({**PUBLISHED[1].config.specs, **STAGED.stages[2].config.specs}, effort="balanced")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default=str(BOOKS) if BOOKS.exists() else None, metavar="FILES")
    parser.add_argument("--heldout", default=str(TEACHER / "heldout.txt"), metavar="FILE")
    parser.add_argument("--budgets", type=int, nargs="+", default=[567_000, 1_134_000], metavar="TOKENS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of compressed students")
    parser.add_argument("--learning-rate-from-scratch", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=16, help="samples of 128 tokens per step")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the teacher in the loss of the distilled")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--shares", type=float, nargs=3, default=[1, 1, 8], help="of the stages in the tokens")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="in the forward pass")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--budget", type=float, default=0.65, help="of the students that have one")
    parser.add_argument("--device", default="cpu", help="on which students are trained")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at a time, each on one thread")
    healing.add_options(parser)


def run(options: argparse.Namespace) -> Iterator[dict]:
    if options.text is None:
        raise SystemExit("--text FILES: expected, as the books that the teacher was trained on are not present")
    if options.model is not None:
        yield from healing.run(options)
        return
    common = {name: value for name, value in vars(options).items() if name in TRAINING}
    # One thread each: two students at a time are faster than one student on two threads.
    with ThreadPoolExecutor(options.jobs) as pool:
        for student in ("teacher", "one-shot, untrained"):
            yield in_fresh_process(common | {"student": student, "tokens": 0, "seed": 0})
        for tokens in options.budgets:
            tasks = [
                common | {"student": student, "tokens": tokens, "seed": seed}
                for seed in options.seeds
                for student in options.students
            ]
            results = []
            for result in pool.map(in_fresh_process, tasks):
                results.append(result)
                yield result
            yield from means(results)


def means(results: list[dict]) -> Iterator[dict]:
    """The mean over the seeds, for every student of one budget."""
    for student in dict.fromkeys(result["student"] for result in results):
        of_seeds = [result for result in results if result["student"] == student]
        found = [result["perplexity"] for result in of_seeds]
        yield {
            "mean of seeds": student,
            "tokens": of_seeds[0]["tokens"],
            "share of the teacher's": f"{of_seeds[0]['tokens'] / TEACHER_TOKENS:.1%}",
            "parameters": of_seeds[0]["parameters"],
            "perplexity": statistics.mean(found),
            "smallest": min(found),
            "largest": max(found),
            "seconds": statistics.mean(result["seconds"] for result in of_seeds),
        }


def in_fresh_process(task: dict) -> dict:
    return lines_of_fresh_process([__file__, json.dumps(task)], 1)[-1]


def one_student(task: argparse.Namespace) -> dict:
    """Trains the student that `task` names, or loads the teacher, and scores it."""
    start = time.perf_counter()
    if task.tokens:
        model = STUDENTS[task.student](task)
    else:
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        if task.student != "teacher":
            compress(model, ONE_SHOT, effort=task.effort, seed=task.seed)
    seconds = time.perf_counter() - start
    model.to(task.device)
    score = perplexity(model, AutoTokenizer.from_pretrained(TEACHER), read_text(task.heldout))
    result = {"student": task.student, "tokens": task.tokens, "seed": task.seed, "parameters": model.num_parameters()}
    return {**result, "perplexity": score.perplexity, "seconds": seconds}


def distilled(recipe: StagedRecipe | TQConfig, learns_from_teacher: bool) -> Callable:
    def train(task: argparse.Namespace) -> PreTrainedModel:
        shared = recipe
        if isinstance(recipe, StagedRecipe):
            stages = zip(recipe.stages, task.shares, strict=True)
            shared = StagedRecipe(tuple(replace(stage, share=share) for stage, share in stages))
        with tempfile.TemporaryDirectory() as folder:
            glance = Path(folder) / "heldout.txt"
            glance.write_text(read_text(task.heldout)[:GLANCE_CHARACTERS], encoding="utf-8")
            distill(
                TEACHER,
                shared,
                text=Path(task.text),
                out=Path(folder) / "student",
                tokens=task.tokens,
                heldout=glance,
                losses=DistillConfig(task.temperature, task.alpha if learns_from_teacher else 0.0, hidden_weight=0.0),
                training=training(task),
                effort=task.effort,
                seed=task.seed,
                device=task.device,
            )
            return AutoModelForCausalLM.from_pretrained(Path(folder) / "student")

    return train


def healed(stages: int) -> Callable:
    """A calibrated budget, trained with the defaults, from 1 in equal steps down to the budget."""

    def train(task: argparse.Namespace) -> PreTrainedModel:
        budgets = [round(1 - (1 - task.budget) * stage / stages, 4) for stage in range(1, stages + 1)]
        with tempfile.TemporaryDirectory() as folder:
            report = distill(
                TEACHER,
                StagedRecipe.of_budgets(*budgets, seed=task.seed),
                text=Path(task.text),
                out=Path(folder) / "student",
                tokens=task.tokens,
                heldout=TEACHER / "evaluation.txt",
                training=TrainingConfig(seed=task.seed),
                device=task.device,
            )
            print(report, file=sys.stderr)
            return AutoModelForCausalLM.from_pretrained(Path(folder) / "student")

    return train


def from_scratch(task: argparse.Namespace) -> PreTrainedModel:
    settings = replace(training(task), learning_rate=task.learning_rate_from_scratch)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    config = AutoModelForCausalLM.from_pretrained(TEACHER).config
    # The teacher's depth and heads; the width that gives about as many parameters as the compressed student has.
    config = type(config)(**{**config.to_dict(), "n_embd": 196})
    torch.manual_seed(task.seed)
    student = GPT2LMHeadModel(config)
    blocks = token_blocks(Path(task.text), tokenizer, config.n_positions)
    samples = blocks.drawn(task.tokens // blocks.seq_len, task.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, Path(folder), len(samples) // settings.batch_size, task.device)
        # This run is not resumed.
        arguments.set_save("no")
        trainer = DistillTrainer(student, arguments, distill=DistillConfig(alpha=0.0), train_dataset=samples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # Score in float32, as the other students.
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    return student


def training(task: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        bf16=task.bf16,
        save_steps=0.5,
        seed=task.seed,
    )


STUDENTS: dict[str, Callable] = {
    "staged, distilled": distilled(STAGED, True),
    "one-shot, distilled": distilled(ONE_SHOT, True),
    "staged, labels alone": distilled(STAGED, False),
    "budget, one-shot": healed(1),
    "budget, staged": healed(3),
    "from scratch": from_scratch,
}
# Options that are passed to the process of a student.
TRAINING = (
    "text",
    "heldout",
    "budget",
    "learning_rate",
    "learning_rate_from_scratch",
    "batch_size",
    "alpha",
    "temperature",
    "shares",
    "bf16",
    "effort",
    "device",
)

if __name__ == "__main__":
    print(json.dumps(one_student(argparse.Namespace(**json.loads(sys.argv[1])))))
