"""Held-out perplexity of distilled students against their rivals, all trained on the same tokens, over several seeds.

The teacher is the small GPT-2 of this repository; the students have about 65% of its parameters. Rivals:

- staged, distilled: the stages of `tq-81m-staged`, its last one milder, so that 65% are left and not 60%;
- one-shot, distilled: the same shapes at once, then the same training;
- staged, labels alone: the stages, trained on the next token and not on the teacher;
- from scratch: a narrower dense GPT-2 of as many parameters, random weights, trained on the next token.

Budgets are in tokens; 567,000 is 3.1% of what the teacher was trained on. The text is not in the repository: `--text`
names yours (by default the books that the teacher was trained on, where they are at hand). Each run takes minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measuring import ROOT
from tqcompressor import KroneckerSpec, TQConfig, token_blocks
from tqcompressor.evaluate import perplexity, read_text
from tqcompressor.staged_distillation import distill
from tqcompressor.stages import STAGED_RECIPES, Stage, StagedRecipe
from tqcompressor.trainer import DistillTrainer
from tqcompressor.training_config import DistillConfig, TrainingConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
)

TEACHER = ROOT / "tests" / "data" / "tiny-gpt2"
BOOKS = ROOT.parent / "shared" / "data" / "books" / "train.txt"
TEACHER_TOKENS = 18_300_000
# What `distill` scores on after every stage; the table has the whole text.
GLANCE_CHARACTERS = 20_000

PUBLISHED = STAGED_RECIPES["tq-81m-staged"].stages
STAGED = StagedRecipe(
    (*PUBLISHED[:2], Stage("embedding-again", TQConfig({"wte": KroneckerSpec((1, 8), 3, "columns")})))
)
ONE_SHOT = TQConfig({**PUBLISHED[1].config.specs, **STAGED.stages[2].config.specs})


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default=str(BOOKS) if BOOKS.exists() else None, metavar="FILES")
    parser.add_argument("--heldout", type=Path, default=TEACHER / "heldout.txt", metavar="FILE")
    parser.add_argument("--budgets", type=int, nargs="+", default=[567_000, 1_134_000], metavar="TOKENS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks of 128 tokens per step")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the teacher in the loss of the distilled")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--precision", default="bfloat16", help="of the forward pass of every student")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--shares", type=float, nargs=3, default=[1, 1, 1], help="of the stages in the tokens")


def run(options: argparse.Namespace) -> Iterator[dict]:
    if options.text is None:
        raise SystemExit("--text FILES: the books that the teacher was trained on are not here")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = read_text(options.heldout)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    yield {
        "model": "teacher",
        "parameters": teacher.num_parameters(),
        "perplexity": perplexity(teacher, tokenizer, text).perplexity,
    }
    for tokens in options.budgets:
        figures: dict[str, list[dict]] = {name: [] for name in options.students}
        for seed in options.seeds:
            for name in options.students:
                start = time.perf_counter()
                student = STUDENTS[name](options, tokens, seed)
                result = {
                    "student": name,
                    "tokens": tokens,
                    "seed": seed,
                    "parameters": student.num_parameters(),
                    "perplexity": perplexity(student, tokenizer, text).perplexity,
                    "seconds": time.perf_counter() - start,
                }
                print("  ".join(f"{key}={value}" for key, value in result.items()), flush=True)
                figures[name].append(result)
                yield result
        for name, results in figures.items():
            found = [result["perplexity"] for result in results]
            yield {
                "mean of seeds": name,
                "tokens": tokens,
                "share of the teacher's": f"{tokens / TEACHER_TOKENS:.1%}",
                "parameters": results[0]["parameters"],
                "perplexity": statistics.mean(found),
                "smallest": min(found),
                "largest": max(found),
                "seconds": statistics.mean(result["seconds"] for result in results),
            }


def distilled(recipe: StagedRecipe | TQConfig, learns_from_teacher: bool) -> Callable:
    def train(options: argparse.Namespace, tokens: int, seed: int) -> PreTrainedModel:
        shared = recipe
        if isinstance(recipe, StagedRecipe):
            stages = zip(recipe.stages, options.shares, strict=True)
            shared = StagedRecipe(tuple(replace(stage, share=share) for stage, share in stages))
        with tempfile.TemporaryDirectory() as folder:
            glance = Path(folder) / "heldout.txt"
            glance.write_text(read_text(options.heldout)[:GLANCE_CHARACTERS], encoding="utf-8")
            distill(
                TEACHER,
                shared,
                texts=options.text,
                out=Path(folder) / "student",
                tokens=tokens,
                heldout=glance,
                losses=DistillConfig(options.temperature, options.alpha if learns_from_teacher else 0.0),
                training=training(options, seed),
                effort=options.effort,
                seed=seed,
                device="cpu",
            )
            return AutoModelForCausalLM.from_pretrained(Path(folder) / "student")

    return train


def from_scratch(options: argparse.Namespace, tokens: int, seed: int) -> PreTrainedModel:
    settings = training(options, seed)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    config = AutoModelForCausalLM.from_pretrained(TEACHER).config
    # The teacher's depth and heads; the width that gives about as many parameters as the compressed student has.
    config = type(config)(**{**config.to_dict(), "n_embd": 196})
    torch.manual_seed(seed)
    student = GPT2LMHeadModel(config)
    blocks = token_blocks(options.text, tokenizer, config.n_positions).take(tokens)
    steps = len(blocks) // settings.batch_size
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=round(settings.warmup * steps),
            lr_scheduler_type="cosine",
            weight_decay=settings.weight_decay,
            bf16=settings.precision == "bfloat16",
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        trainer = DistillTrainer(student, arguments, distill=DistillConfig(alpha=0.0), train_dataset=blocks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # Without the mixed precision of its training, as the others are scored.
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    return student


def training(options: argparse.Namespace, seed: int) -> TrainingConfig:
    settings = TrainingConfig(batch_size=options.batch_size, learning_rate=options.learning_rate, checkpoints=1)
    return replace(settings, precision=options.precision, seed=seed)


STUDENTS: dict[str, Callable] = {
    "staged, distilled": distilled(STAGED, True),
    "one-shot, distilled": distilled(ONE_SHOT, True),
    "staged, labels alone": distilled(STAGED, False),
    "from scratch": from_scratch,
}
