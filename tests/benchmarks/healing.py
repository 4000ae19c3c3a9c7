"""A language model with a context of its own, compressed to a budget and healed: perplexity on two domains.

`run.py distillation --model DIR`: SmolLM2-135M, calibrated on WikiText-2 and books, trained on tokens drawn from
WikiText-2 valid and the books, and scored as in `quality` before and after. One-shot, in stages down to the budget, and
from a student that was refined on the calibration's sequences.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock
from measuring import lines_of_fresh_process
from quality_data import DATA, Batch, Subject, on, smollm2
from tqcompressor import calibrate, compress
from tqcompressor.calibration.calibration import Calibration
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.runner import distill
from tqcompressor.distillation.stages import StagedRecipe
from tqcompressor.utils.atomic_io import whole_folder
from transformers import AutoModelForCausalLM, PreTrainedModel

# Budgets of the stages, as shares of what is to go; one number is one-shot.
STUDENTS = {
    "compressed": (),
    "refined": (),
    "healed, one-shot": (1.0,),
    "healed, in stages": (1 / 3, 2 / 3, 1.0),
    "refined, healed": (1.0,),
}

# Characters at the end of the books that no student reads, on which its checkpoints are scored.
CHECKED = 60_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint of SmolLM2-135M to heal instead")
    parser.add_argument("--model-tokens", type=int, default=1_000_000, metavar="N", help="that --model is trained on")
    parser.add_argument("--model-students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[None])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="samples of --seq-len tokens a step")
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0], help="the teacher's shares in the loss")
    parser.add_argument("--hidden-weight", type=float, help="of the hidden states in --model's loss")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 512 tokens, of both texts")
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext-2", metavar="FOLDER", help="for --model")
    parser.add_argument("--threads", type=int, default=1, help="of each student of --model")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="of --model's students; a killed run resumes from it")


def run(options: argparse.Namespace) -> Iterator[dict]:
    common = {name: str(getattr(options, name)) for name in ("model", "wikitext", "text", "device", "keep")}
    common |= {"budget": options.budget, "tokens": options.model_tokens, "seq_len": options.seq_len}
    common |= {"samples": options.samples, "seed": options.seeds[0]}
    common |= {"hidden_weight": options.hidden_weight, "bf16": options.bf16}
    trained = list(product(options.learning_rates, options.batch_sizes, options.alphas))
    tasks = [
        common | {"student": student, "learning_rate": learning_rate, "batch_size": batch_size, "alpha": alpha}
        for student in options.model_students
        for learning_rate, batch_size, alpha in (trained if STUDENTS[student] else [(0.0, 0, 0.0)])
    ]
    subject = of(argparse.Namespace(**common))
    subject.model.to(options.device)
    yield {"student": "dense", "parameters": subject.model.num_parameters(), **subject.score(subject.model)}
    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(partial(in_fresh_process, threads=options.threads), tasks)


def in_fresh_process(task: dict, threads: int) -> dict:
    return lines_of_fresh_process([__file__, json.dumps(task)], threads)[-1]


def of(task: argparse.Namespace) -> Subject:
    return smollm2(Path(task.model), Path(task.wikitext), Path(task.text), task.samples, "both")


@contextmanager
def folder_of(task: argparse.Namespace) -> Iterator[Path]:
    """Where the students lie: a folder of the caller's, or one that is gone afterwards."""
    if task.keep != "None":
        yield Path(task.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def untrained(subject: Subject, task: argparse.Namespace, calibration: Calibration, folder: Path) -> PreTrainedModel:
    """The compressed student, refined or not. It is kept: the first of several runs makes it, the others read it."""
    refined = "refined" in task.student
    kept = folder / f"{'refined' if refined else 'compressed'}, {task.budget}, {task.samples} samples"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            model = subject.copy() if refined else subject.copy().cpu()
            compress(
                model,
                budget=task.budget,
                calibration=calibration,
                refine=batches_of(subject, task) if refined else False,
                seed=task.seed,
                progress=False,
            )
            with whole_folder(kept) as partial_folder:
                model.save_pretrained(partial_folder)
    return AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)


def one_student(task: argparse.Namespace) -> dict:
    """Compresses or heals the student that `task` names, and scores it on both domains."""
    subject = of(task)
    subject.model.to(task.device)
    dense = subject.score(subject.model)
    start, trained, steps = time.perf_counter(), 0, STUDENTS[task.student]
    with folder_of(task) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        calibration = calibration_of(subject, task, folder)
        if len(steps) > 1:
            budgets = [round(1 - (1 - task.budget) * step, 4) for step in steps]
            source = {"recipe": StagedRecipe.of_budgets(*budgets, seed=task.seed), "calibration": calibration}
        else:
            model = untrained(subject, task, calibration, folder)
            source = {"student": model, "calibration": calibration}
        if steps:
            weights = f"{task.alpha}, {task.hidden_weight}"
            settings = f"{task.tokens} tokens, {task.learning_rate}, {task.batch_size}, {weights}, {task.bf16}"
            books = Path(task.text).read_text(encoding="utf-8")
            out = folder / f"{task.student}, {task.budget}, {task.samples} samples, {settings}"
            report = distill(
                task.model,
                **source,
                text=[Path(task.wikitext) / "valid.txt", books[:-CHECKED]],
                heldout=books[-CHECKED:],
                out=out,
                tokens=task.tokens,
                losses=DistillConfig(alpha=task.alpha, hidden_weight=task.hidden_weight),
                training=TrainingConfig(
                    seq_len=task.seq_len,
                    batch_size=task.batch_size,
                    learning_rate=task.learning_rate,
                    bf16=task.bf16,
                    seed=task.seed,
                ),
                device=task.device,
                resume=True,
            )
            print(report, file=sys.stderr)
            trained = sum(stage.tokens for stage in report.stages)
            model = AutoModelForCausalLM.from_pretrained(out)
        model.to(task.device)
    result = {"student": task.student, "tokens": trained, "learning rate": task.learning_rate}
    result |= {"batch": task.batch_size, "alpha": task.alpha, "parameters": model.num_parameters()}
    for name, found in subject.score(model).items():
        result |= {name: found, f"{name} / dense": found / dense[name]}
    return result | {"seconds": time.perf_counter() - start}


def calibration_of(subject: Subject, task: argparse.Namespace, folder: Path) -> Calibration:
    """On the sequences of both texts; kept as the students are."""
    kept = folder / f"{task.samples} samples.safetensors"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            calibrate(subject.model, batches_of(subject, task), seed=task.seed, progress=False).save(kept)
    return Calibration.load(kept)


def batches_of(subject: Subject, task: argparse.Namespace) -> list[Batch]:
    return [on(subject.model.device, batch) for batch in subject.calibration(task.seed)]


if __name__ == "__main__":
    line = one_student(argparse.Namespace(**json.loads(sys.argv[1])))
    # Shown at once, because the table waits for all students.
    print(json.dumps(line), file=sys.stderr, flush=True)
    print(json.dumps(line))
