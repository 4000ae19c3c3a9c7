"""Fused losses against torch, eager and compiled: CPU time, wall time and extra peak memory of value and gradient.

`logits` is cross-entropy + KL at T = 2 of 512 × 50257 logits in float32; `head` the same from 2048 hidden states of
width 768, with `labels only` or a teacher, beside the time of its matrix products alone. The methods take turns within
one process, after one run each that does not count, and the figures are medians; memory is measured in a process per
method, and includes the gradient itself. `cpu ratio` and `memory ratio` are how many times more a method takes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import fresh_process, resident, restart_peak

LOGITS, QUICK_LOGITS = (512, 50257), (16, 503)
HEAD, QUICK_HEAD = (2048, 768, 50257), (16, 8, 503)
OURS = "tqcompressor"
CASES = {
    "logits": (OURS, "torch eager", "torch.compile"),
    "head, labels only": (OURS, "matrix products alone", "torch eager"),
    "head, teacher": (OURS, "matrix products alone", "torch eager"),
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


def methods(case: str, threads: int, quick: bool) -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as functional
    from tqcompressor import losses

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def reference(student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        hard = functional.cross_entropy(student, labels)
        if teacher is None:
            return hard
        p, log_q = functional.softmax(teacher / 2, -1), functional.log_softmax(student / 2, -1)
        return 0.5 * 4 * functional.kl_div(log_q, p, reduction="batchmean") + 0.5 * hard

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
    if task["memory_of"] is None:
        print(json.dumps(times(task["case"], task["threads"], task["repeats"], task["quick"])))
    else:
        print(json.dumps(extra_memory(task["case"], task["threads"], task["quick"], task["memory_of"])))
