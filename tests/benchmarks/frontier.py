"""Draws `frontier.png`, the picture of the README, from the table of whole-model budgets in this folder's README.md.

`python tests/benchmarks/frontier.py [FILE]`
"""

import re
import sys
from pathlib import Path

from tqcompressor.plots import plot_frontier

HERE = Path(__file__).parent
BUDGETS = (0.5, 0.65, 0.8)
DENSE = (1.0, 72.3)


def frontier() -> dict[str, list[tuple[float, float]]]:
    """By method, the share of parameters that is kept and the perplexity of tiny-gpt2."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    table = re.search(r"Budgets of the whole model[^|]*((?:\|.*\n)+)", text)
    assert table, "README.md: expected a table below 'Budgets of the whole model'"
    rows = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in table[1].splitlines()[2:]]
    return {
        row[0]: [(budget, float(cell)) for budget, cell in zip(BUDGETS, row[-len(BUDGETS) :], strict=True)]
        for row in rows
    }


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "frontier.png"
    figure = plot_frontier(frontier(), dense=DENSE, quality="perplexity of tiny-gpt2", log_scale=True)
    # Without the version of matplotlib, so that the same drawing is the same file.
    figure.savefig(target, dpi=110, metadata={"Software": None})
    print(target)


if __name__ == "__main__":
    main()
