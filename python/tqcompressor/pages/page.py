"""One HTML page about a compressed checkpoint or a sweep. It loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compression.card import facts_of, figures_of, read_evaluation, report_in, scores_of
from ..compression.figure import report_figure
from ..compression.kinds import KINDS, kind_of
from ..compression.report import REPORT_FILE, CompressionReport, MatrixReport
from ..config.specs import describe
from ..distillation.report import REPORT_FILE as TRAINING_REPORT_FILE
from ..distillation.report import TrainingReport
from ..errors import CheckpointError, DestinationError
from ..frontier.results import SWEEP_FILE, SweepResult, read_sweep
from ..utils.atomic_io import WholeFile
from ..utils.hub import StrPath
from ..utils.svg import escape
from ..utils.utf8 import read_form

# Nothing is loaded, whatever a name in the page holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --soft: #9198a1; --page: #0d1117; --card: #151b23; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1200px; background: var(--page); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p.lead, td.soft, .tile span { color: var(--soft); }
code, pre { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
  white-space: pre-wrap; }
aside { border-left: 4px solid #E69F00; background: var(--card); padding: .5rem 1rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: 0; background: var(--card); white-space: nowrap; z-index: 1; }
th:first-child, td:first-child, td.left, th.left { text-align: left; }
td { white-space: nowrap; }
td:first-child, td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 10.5rem; }
td:first-child { position: sticky; left: 0; background: var(--page); }
tr:last-child td { border-bottom: 0; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.bar { display: inline-block; width: 70px; height: .6em; margin-left: .5em; background: var(--line);
  vertical-align: baseline; }
.bar i { display: block; height: 100%; background: #0072B2; }
figure { margin: 1rem 0; }
footer { margin-top: 3rem; color: var(--soft); font-size: 13px; }
"""


def html_report(
    source: StrPath, html: StrPath, *, sweep: StrPath | None = None, evaluation: StrPath | None = None
) -> None:
    """Writes one HTML page about the compressed checkpoint or the sweep in `source`.

    The page has the plan layer by layer, sizes and perplexities before and after, how the model was made and, where a
    sweep is known, its budgets side by side. It is one file that loads nothing and runs no script, in light and dark.

    Args:
        source: The folder of a compressed checkpoint, of a distillation's result, or of a sweep.
        html: The file to write. An earlier one is replaced.
        sweep: The `sweep.json` of the model's source. Default: the one in `source`, if there is one.
        evaluation: A file that `tqcompressor evaluate --json` printed. Default: what `record_evaluation` kept in
            `source`, if there is something.

    Raises:
        CheckpointError: `source` has neither the report of a compression nor a sweep, or a file is not what it is
            given as.
        DestinationError: `html` is a folder.
        StorageError: The operating system refused.
        OSError: A file cannot be read.

    Example:
        >>> from tqcompressor import compress_checkpoint
        >>> report = compress_checkpoint("tests/data/tiny-gpt2", "tiny-gpt2-compressed", budget=0.65)
        >>> html_report("tiny-gpt2-compressed", "tiny-gpt2-compressed.html")
    """
    folder, target = Path(source), Path(html)
    if target.is_dir():
        raise DestinationError(f"{target} is a folder: expected the name of a file")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    beside = folder / SWEEP_FILE
    known = read_sweep(Path(sweep)) if sweep is not None else read_sweep(beside) if beside.exists() else None
    report = report_in(folder) if known is None or (folder / REPORT_FILE).exists() else None
    scores = read_evaluation(folder) if evaluation is None else _evaluation(Path(evaluation))
    page = _page(report, known, scores, _training(folder), folder.resolve().name)
    with WholeFile(target) as file:
        file.write(page.encode("utf-8", "replace"))


def _evaluation(path: Path) -> Mapping[str, Any]:
    def build(found: Any) -> Mapping[str, Any]:
        if not isinstance(found, dict) or not scores_of(found):
            raise ValueError("no perplexity in it")
        return found

    return read_form(path, build, "the output of evaluate --json")


def _training(folder: Path) -> TrainingReport | None:
    def build(data: Any) -> TrainingReport:
        report = TrainingReport.from_dict(data)
        report.rows()
        return report

    path = folder / TRAINING_REPORT_FILE
    return read_form(path, build, "a report of a distillation") if path.exists() else None


def _page(
    report: CompressionReport | None,
    sweep: SweepResult | None,
    scores: Mapping[str, Any] | None,
    training: TrainingReport | None,
    folder: str,
) -> str:
    name = (report.source if report is not None else sweep.source if sweep is not None else None) or folder
    title = f"{name}, compressed" if report is not None else f"{name}: a sweep of budgets"
    parts = [f"<h1>{escape(title)}</h1>"]
    if report is not None:
        parts += _summary(report, scores)
    if training is not None:
        parts += ["<h2>Distillation</h2>", _table(training.rows())]
    if sweep is not None:
        parts += _frontier(sweep)
    if report is not None:
        parts += _plan(report)
        parts += _making(report)
    version = report.version if report is not None else sweep.version if sweep is not None else ""
    parts.append(f"<footer>Written by tqcompressor {escape(version)}.</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon of its own, so that no browser asks for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _summary(report: CompressionReport, scores: Mapping[str, Any] | None) -> list[str]:
    kinds: dict[str, int] = {}
    for matrix in report.matrices:
        kind = kind_of(matrix.spec)
        kinds[kind] = kinds.get(kind, 0) + 1
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    rows = figures_of(report, scores)
    tiles = []
    for title, before, after, share in rows:
        shown = share or after
        below = f"{title}: {before} → {after}" if before else title
        tiles.append(f'<div class="tile"><b>{escape(shown)}</b><span>{escape(below)}</span></div>')
    parts = [
        f'<p class="lead">{len(report.matrices)} compressed matrices: {escape(counted)}.</p>',
        f'<div class="tiles">{"".join(tiles)}</div>',
    ]
    parts += [f"<aside>{escape(line)}</aside>" for line in (report.note or "").splitlines()]
    return [*parts, "<h2>Before and after</h2>", _table([["", "before", "after", "kept"], *rows])]


def _frontier(sweep: SweepResult) -> list[str]:
    said = f"{sweep.measure} on {sweep.heldout}, measured by the engine {sweep.engine}"
    norm = "the norm of a calibration" if sweep.calibrated else "the Frobenius norm, without a calibration"
    rest = "" if sweep.complete else " It is not complete."
    return [
        "<h2>Budgets side by side</h2>",
        f'<p class="lead">{escape(said)}; compressed in {norm}.{rest}</p>',
        f"<figure>{sweep.to_svg(standalone=False)}</figure>",
        _table(sweep.cells()),
    ]


def _plan(report: CompressionReport) -> list[str]:
    norm = "the norm of the calibration" if report.calibrated else "the Frobenius norm"
    header = ["matrix", "kind", "becomes", "shape", "parameters", "after", "kept", "MACs", "after", "lost energy"]
    most = max((matrix.lost_energy or 0.0 for matrix in report.matrices), default=0.0)
    rows = [_row(matrix, most) for matrix in report.matrices]
    kept = sum(tensor.parameters for tensor in report.untouched)
    return [
        "<h2>Layer by layer</h2>",
        f'<p class="lead">Lost energy is ‖W − Ŵ‖² / ‖W‖² in {norm}. {len(report.untouched)} other tensors with '
        f"{kept:,} parameters are unchanged. MACs are those for one token.</p>",
        f"<figure>{report_figure(report, standalone=False)}</figure>",
        _markup_table(header, rows, left=(0, 1, 2), wrapped=(2,)),
    ]


def _row(matrix: MatrixReport, most: float) -> list[str]:
    kind = kind_of(matrix.spec)
    lost = matrix.lost_energy
    share = 100 * (lost or 0.0) / most if most > 0 else 0.0
    bar = f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'
    return [
        f"<code>{escape(matrix.name)}</code>",
        f'<span class="dot" style="background:{KINDS[kind]}"></span>{escape(kind)}',
        escape("" if matrix.spec is None else describe(matrix.spec)),
        escape(" × ".join(map(str, matrix.shape))),
        f"{matrix.parameters_before:,}",
        f"{matrix.parameters_after:,}",
        f"{matrix.parameters_after / max(matrix.parameters_before, 1):.0%}",
        "" if matrix.macs_before is None else f"{matrix.macs_before:,}",
        "" if matrix.macs_after is None else f"{matrix.macs_after:,}",
        "" if lost is None else f"{lost:.4f}{bar}",
    ]


def _making(report: CompressionReport) -> list[str]:
    facts = facts_of(report, lambda text: f"<code>{escape(text)}</code>")
    parts = ["<h2>How it was made</h2>", _markup_table(["", ""], facts, left=(0, 1), wrapped=(1,))]
    if report.command is not None:
        parts.append(f"<p>The same again:</p>\n<pre>{escape(report.command)}</pre>")
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, the header first."""
    header, *others = rows
    return _markup_table(list(header), [[escape(cell) for cell in row] for row in others], left=(0,))


def _markup_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int], wrapped: Sequence[int] = ()
) -> str:
    """A table whose cells are markup; the columns `left` are aligned to the left, and long cells of `wrapped` wrap."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="left{" wrap" * (number in wrapped)}">{cell}</{tag}>'
            if number in left
            else f"<{tag}>{cell}</{tag}>"
            for number, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', [escape(cell) for cell in header])}</tr></thead>" if any(header) else ""
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'
