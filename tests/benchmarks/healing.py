"""A language model with a context of its own, compressed to a budget and healed: perplexity on two domains.

`run.py distillation --model DIR`: SmolLM2-135M, calibrated on WikiText-2 and books, trained on WikiText-2 valid and
then on books, and scored as in `quality` before and after. One-shot, in stages down to the budget, and from a student
that was refined on the calibration's sequences.
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
from pathlib import Path

from measuring import lines_of_fresh_process
from quality_data import DATA, Subject, on, smollm2
from tqcompressor import calibrate, compress
from tqcompressor.distillation.config import TrainingConfig
from tqcompressor.distillation.runner import distill
from tqcompressor.distillation.stages import StagedRecipe
from transformers import AutoModelForCausalLM

# Budgets of the stages, as shares of what is to go; one number is one-shot.
STUDENTS = {
    "compressed": (),
    "refined": (),
    "healed, one-shot": (1.0,),
    "healed, in stages": (1 / 3, 2 / 3, 1.0),
    "refined, healed": (1.0,),
}
# Calibration sequences of 512 tokens, half of them of each text.
CALIBRATION_SAMPLES = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint of SmolLM2-135M to heal instead")
    parser.add_argument("--model-tokens", type=int, default=1_000_000, metavar="N", help="that --model is trained on")
    parser.add_argument("--model-students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[TrainingConfig.learning_rate])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="samples of --seq-len tokens a step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--wikitext", type=Path, default=DATA / "wikitext-2", metavar="FOLDER", help="for --model")
    parser.add_argument("--threads", type=int, default=1, help="of each student of --model")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="of --model's students; a killed run resumes from it")


def run(options: argparse.Namespace) -> Iterator[dict]:
    common = {name: str(getattr(options, name)) for name in ("model", "wikitext", "text", "device", "keep")}
    common |= {"budget": options.budget, "tokens": options.model_tokens, "seq_len": options.seq_len}
    common["seed"] = options.seeds[0]
    tasks = []
    for student in options.model_students:
        for learning_rate in options.learning_rates if STUDENTS[student] else [0.0]:
            for batch_size in options.batch_sizes if STUDENTS[student] else [0]:
                tasks.append(common | {"student": student, "learning_rate": learning_rate, "batch_size": batch_size})
    subject = of(argparse.Namespace(**common))
    subject.model.to(options.device)
    yield {"student": "dense", "parameters": subject.model.num_parameters(), **subject.score(subject.model)}
    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(partial(in_fresh_process, threads=options.threads), tasks)


def in_fresh_process(task: dict, threads: int) -> dict:
    return lines_of_fresh_process([__file__, json.dumps(task)], threads)[-1]


def of(task: argparse.Namespace) -> Subject:
    return smollm2(Path(task.model), Path(task.wikitext), Path(task.text), CALIBRATION_SAMPLES, "both")


def needed(task: argparse.Namespace) -> int:
    """Characters of the books: more than the tokens need, few enough that a hundredth is quick to score."""
    return 5 * task.tokens


@contextmanager
def folder_of(task: argparse.Namespace) -> Iterator[Path]:
    if task.keep != "None":
        yield Path(task.keep) / f"{task.student}, {task.budget}, {task.tokens} at {task.learning_rate}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "student"


def one_student(task: argparse.Namespace) -> dict:
    """Compresses or heals the student that `task` names, and scores it on both domains."""
    subject = of(task)
    subject.model.to(task.device)
    dense = subject.score(subject.model)
    batches = [on(subject.model.device, batch) for batch in subject.calibration(task.seed)]
    calibration = calibrate(subject.model, batches, seed=task.seed, progress=False)
    start, trained, steps = time.perf_counter(), 0, STUDENTS[task.student]
    refined = "refined" in task.student
    with folder_of(task) as folder:
        if steps and not refined:
            budgets = [round(1 - (1 - task.budget) * step, 4) for step in steps]
            source = {"recipe": StagedRecipe.of_budgets(*budgets, seed=task.seed), "calibration": calibration}
        else:
            model = subject.copy() if refined else subject.copy().cpu()
            compress(
                model,
                budget=task.budget,
                calibration=calibration,
                refine=batches if refined else False,
                seed=task.seed,
                progress=False,
            )
            model.to(task.device)
            source = {"student": model}
        if steps:
            report = distill(
                task.model,
                **source,
                text=[Path(task.wikitext) / "valid.txt", Path(task.text).read_text(encoding="utf-8")[: needed(task)]],
                out=folder,
                tokens=task.tokens,
                training=TrainingConfig(
                    seq_len=task.seq_len,
                    batch_size=task.batch_size,
                    learning_rate=task.learning_rate,
                    seed=task.seed,
                ),
                device=task.device,
                resume=True,
            )
            print(report, file=sys.stderr)
            trained = sum(stage.tokens for stage in report.stages)
            model = AutoModelForCausalLM.from_pretrained(folder).to(task.device)
    result = {"student": task.student, "tokens": trained, "learning rate": task.learning_rate}
    result |= {"batch": task.batch_size, "parameters": model.num_parameters()}
    for name, found in subject.score(model).items():
        result |= {name: found, f"{name} / dense": found / dense[name]}
    return result | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    line = one_student(argparse.Namespace(**json.loads(sys.argv[1])))
    # Shown at once, because the table waits for all students.
    print(json.dumps(line), file=sys.stderr, flush=True)
    print(json.dumps(line))
