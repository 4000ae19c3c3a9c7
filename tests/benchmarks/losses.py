"""Distillation losses with their gradients against torch: time and memory, warm and cold, and a step of training.

CE + KL at temperature 2. "logits": 512 × 50257. "head": 2048 hidden states of width 768 and heads of 50257 tokens, from
hidden states to the gradients of hidden states and head, with labels only, and with a teacher. Methods take turns
within one process, after one run each that does not count, and the figures are medians; memory is measured in a process
per method, and includes the gradient itself. `cpu ratio` and `memory ratio` are how many times more a method takes.

"cold logits" is one call in a process of its own, five times, after a tiny one that loads the code: no memory is mapped
before but that of student and teacher, whose logits come from a layer. "first loss" is the first call of all, with the
imports that it takes beyond torch's. "training step" is one of tiny-gpt2's with an equal teacher, 8 × 128 tokens:
forward passes, loss and backward pass. Here the ratios are over the first method of the same run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import fresh_process, resident, restart_peak

if TYPE_CHECKING:
    import torch

LOGITS, QUICK_LOGITS = (512, 50257), (16, 503)
HEAD, QUICK_HEAD = (2048, 768, 50257), (16, 8, 503)
OURS, IN_PLACE = "tqcompressor", "tqcompressor, in place"
# Fresh processes for each method of a case that is about the first call.
COLD_RUNS = 5
TINY_GPT2 = Path(__file__).resolve().parents[1] / "data" / "tiny-gpt2"
CASES = {
    "logits": (OURS, "torch eager", "torch.compile"),
    "head, labels only": (OURS, "matrix products alone", "torch eager"),
    "head, teacher": (OURS, "matrix products alone", "torch eager"),
    "cold logits": (IN_PLACE, OURS, "torch eager"),
    "first loss": (OURS,),
    "training step": (IN_PLACE, OURS),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="of logits; the head gets three at most")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], metavar="N")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")


def run(options: argparse.Namespace) -> Iterator[dict]:
    for case in options.cases:
        for threads in options.threads:
            task = {"case": case, "threads": threads, "repeats": options.repeats, "quick": options.quick}
            if case in ONCE:
                yield from run_once(task, 1 if options.quick else COLD_RUNS)
                continue
            times = json.loads(fresh_process([__file__, json.dumps(task | {"memory_of": None})], threads)[2])
            memory = {
                method: json.loads(fresh_process([__file__, json.dumps(task | {"memory_of": method})], threads)[2])
                for method in CASES[case]
            }
            for method, (cpu, wall) in times.items():
                yield {
                    "case": case,
                    "threads": threads,
                    "method": method,
                    "cpu ms": 1000 * cpu,
                    "wall ms": 1000 * wall,
                    "extra MB": memory[method],
                    "cpu ratio": cpu / times[OURS][0],
                    "memory ratio": memory[method] / max(memory[OURS], 1e-9),
                }


def run_once(task: dict, runs: int) -> Iterator[dict]:
    """A row for each method and run; `cpu ratio` and `wall ratio` are over the first method of the same run."""
    case = task["case"]
    for run in range(1, runs + 1):
        first: dict[str, float] = {}
        for method in CASES[case]:
            measured = json.loads(fresh_process([__file__, json.dumps(task | {"once": method})], task["threads"])[2])
            first = first or measured
            yield (
                {"case": case, "threads": task["threads"], "run": run, "method": method}
                | measured
                | {f"{clock} ratio": measured[f"{clock} ms"] / first[f"{clock} ms"] for clock in ("cpu", "wall")}
            )


def reference(student: "torch.Tensor", teacher: "torch.Tensor | None", labels: "torch.Tensor") -> "torch.Tensor":
    """The loss by torch's own functions."""
    import torch.nn.functional as functional

    hard = functional.cross_entropy(student, labels)
    if teacher is None:
        return hard
    p, log_q = functional.softmax(teacher / 2, -1), functional.log_softmax(student / 2, -1)
    return 0.5 * 4 * functional.kl_div(log_q, p, reduction="batchmean") + 0.5 * hard


def cold_logits(method: str, threads: int, quick: bool) -> dict[str, float]:
    import torch
    from tqcompressor import losses

    class Layer(torch.autograd.Function):
        """Makes logits at no cost, and takes their gradient."""

        @staticmethod
        def forward(ctx: object, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return logits.detach()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return gradient[0, 0], None

    def step(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> None:
        logits = Layer.apply(torch.zeros((), requires_grad=True), student)
        if method == "torch eager":
            reference(logits, teacher, labels).backward()
        else:
            losses.distillation_loss(logits, teacher, labels, inplace=method == IN_PLACE).backward()

    def inputs(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return 4 * torch.randn(rows, vocabulary), 4 * torch.randn(rows, vocabulary), torch.arange(rows) % vocabulary

    torch.set_num_threads(threads)
    step(*inputs(*QUICK_LOGITS))
    arguments = inputs(*(QUICK_LOGITS if quick else LOGITS))
    return once(lambda: step(*arguments))


def first_loss(_: str, threads: int, quick: bool) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    student, teacher = torch.randn(16, 503, requires_grad=True), torch.randn(16, 503)

    def step() -> None:
        from tqcompressor import losses

        losses.distillation_loss(student, teacher, torch.arange(16)).backward()

    return once(step)


def training_step(method: str, threads: int, quick: bool) -> dict[str, float]:
    import tempfile

    import torch
    from tqcompressor.distillation import trainer
    from transformers import AutoModelForCausalLM, TrainingArguments

    torch.set_num_threads(threads)
    if method == OURS:
        trainer._may_be_overwritten = lambda logits: False
    student, teacher = (AutoModelForCausalLM.from_pretrained(TINY_GPT2, dtype=torch.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, report_to="none", use_cpu=True)
        made = trainer.DistillTrainer(student, arguments, teacher=teacher)
    student.train()
    tokens = torch.randint(student.config.vocab_size, (1 if quick else 8, student.config.n_positions))

    def step() -> None:
        made.compute_loss(student, {"input_ids": tokens}).backward()

    for _ in range(3):
        step()
    steps = [once(step) for _ in range(3 if quick else 15)]
    return {name: statistics.median(taken[name] for taken in steps) for name in steps[0]}


ONCE = {"cold logits": cold_logits, "first loss": first_loss, "training step": training_step}


def once(function: Callable[[], object]) -> dict[str, float]:
    """CPU and wall milliseconds of a call, and its peak of memory beyond what is resident before."""
    before = restart_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu ms": 1000 * cpu, "wall ms": 1000 * wall, "extra MB": resident("VmHWM") - before}


def methods(case: str, threads: int, quick: bool) -> dict[str, Callable[[], object]]:
    import torch
    from tqcompressor import losses

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    if case == "logits":
        rows, vocabulary = QUICK_LOGITS if quick else LOGITS
        student = (4 * torch.randn(rows, vocabulary)).requires_grad_()
        teacher, labels = 4 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
        compiled = torch.compile(reference)
        return {
            OURS: lambda: torch.autograd.grad(losses.distillation_loss(student, teacher, labels), student),
            "torch eager": lambda: torch.autograd.grad(reference(student, teacher, labels), student),
            "torch.compile": lambda: torch.autograd.grad(compiled(student, teacher, labels), student),
        }

    rows, width, vocabulary = QUICK_HEAD if quick else HEAD
    hidden, head = torch.randn(rows, width).requires_grad_(), (0.1 * torch.randn(vocabulary, width)).requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    teacher_hidden = torch.randn(rows, width) if case.endswith("teacher") else None
    teacher_head = 0.1 * torch.randn(vocabulary, width) if case.endswith("teacher") else None

    def ours() -> object:
        loss = losses.head_distillation_loss(hidden, head, teacher_hidden, teacher_head, labels)
        return torch.autograd.grad(loss, (hidden, head))

    def eager() -> object:
        teacher = None if teacher_head is None else teacher_hidden @ teacher_head.T
        return torch.autograd.grad(reference(hidden @ head.T, teacher, labels), (hidden, head))

    @torch.no_grad()
    def products() -> object:
        if teacher_head is not None:
            teacher_hidden @ teacher_head.T
        logits = hidden @ head.T
        return logits @ head, logits.T @ hidden

    return {OURS: ours, "matrix products alone": products, "torch eager": eager}


def times(case: str, threads: int, repeats: int, quick: bool) -> dict[str, tuple[float, float]]:
    """Median CPU and wall seconds of each method."""
    compared = methods(case, threads, quick)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for method in compared.values():
        method()
    for _ in range(repeats if case == "logits" else min(repeats, 3)):
        for name, method in compared.items():
            cpu, wall = time.process_time(), time.perf_counter()
            method()
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: (statistics.median(cpu for cpu, _ in pairs), statistics.median(wall for _, wall in pairs))
        for name, pairs in taken.items()
    }


def extra_memory(case: str, threads: int, quick: bool, method: str) -> float:
    """Peak resident MB of one run beyond what is resident before, code and inputs included."""
    methods(case, threads, True)[method]()
    function = methods(case, threads, quick)[method]
    if method == "torch.compile":
        # Compiling takes more than running.
        function()
    before = restart_peak()
    function()
    return resident("VmHWM") - before


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    task = json.loads(sys.argv[1])
    if "once" in task:
        print(json.dumps(ONCE[task["case"]](task["once"], task["threads"], task["quick"])))
    elif task["memory_of"] is None:
        print(json.dumps(times(task["case"], task["threads"], task["repeats"], task["quick"])))
    else:
        print(json.dumps(extra_memory(task["case"], task["threads"], task["quick"], task["memory_of"])))
