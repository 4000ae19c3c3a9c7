"""The benchmarks: `python tests/benchmarks/run.py BENCHMARK [--json FILE]`; `--help` lists them.

Every figure in README.md, beside this file, names the sub-command that prints it. Each one prints the machine and the
versions, then a table; `--json FILE` writes the same as JSON. Sub-commands and their options: `--help`.
"""

import argparse
import json
import sys
from pathlib import Path

import calibration
import distillation
import import_time
import inference
import int8
import kernels
import levers
import losses
import paper
import quality
import search
import whole_checkpoint
from measuring import machine
from tqcompressor.utils.tables import format_table

BENCHMARKS = {
    "search": search,
    "kernels": kernels,
    "losses": losses,
    "checkpoint": whole_checkpoint,
    "inference": inference,
    "calibration": calibration,
    "distillation": distillation,
    "quality": quality,
    "levers": levers,
    "int8": int8,
    "paper": paper,
    "import": import_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write machine, options and results as JSON")
        module.add_options(command)
    options = parser.parse_args()

    facts = machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    results = []
    # One dictionary per measurement; results are kept as they come, so that an interrupted run still prints them.
    try:
        for result in BENCHMARKS[options.benchmark].run(options):
            results.append(result)
            # At once, whatever it is read by: a run may take many minutes.
            print("  ".join(f"{name}={show(value)}" for name, value in result.items()), file=sys.stderr, flush=True)
    finally:
        print_tables(results)
        if options.json:
            arguments = {name: str(value) for name, value in vars(options).items() if name != "json"}
            document = {"benchmark": options.benchmark, "machine": facts, "options": arguments, "results": results}
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def print_tables(results: list[dict]) -> None:
    """One table per set of columns, in the order in which they first came."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result), []).append(result)
    for columns, rows in groups.items():
        print("\n" + format_table([list(columns), *([show(row[name]) for name in columns] for row in rows)]))


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
