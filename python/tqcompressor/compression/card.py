"""The model card, `README.md`, of a compressed checkpoint, with its figure.

It is the same for a checkpoint that was compressed on disk and for a live model that is saved. It holds no times and no
dates, so that the same input gives the same bytes. Text from elsewhere, such as the names of matrices, is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _core
from ..config.specs import describe
from ..errors import CheckpointError
from ..utils.atomic_io import WholeFile
from ..utils.hub import StrPath, cached_directory
from ..utils.utf8 import decoded, read_json
from .figure import report_figure
from .kinds import kind_of
from .report import REPORT_FILE, CalibrationRecord, CompressionReport, read_report

CARD_FILE = "README.md"
FIGURE_FILE = "lost_energy.svg"
# The scores of a checkpoint, as `tqcompressor evaluate --record` keeps them.
EVALUATION_FILE = "evaluation.json"
# A card without this line is someone's own, and is not replaced.
MARK = "<!-- tqcompressor writes this card anew when the model is saved, unless this line is removed. -->"
# What transformers writes where a repository has no card.
_TEMPLATE = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
# The metadata of a source that hold for its compressed form, too.
_CARRIED = (
    "license",
    "license_name",
    "license_link",
    "language",
    "datasets",
    "base_model",
    "base_model_relation",
    "pipeline_tag",
)
_LICENSES = re.compile(r"(licen[cs]e|copying)(\.(txt|md|rst))?", re.IGNORECASE)
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"[ ]*-[ \t]+(.*)")
# A scalar that YAML reads as itself; those in the set it would read as a boolean or nothing.
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)
_NOT_TEXT = {"yes", "no", "true", "false", "on", "off", "null", "y", "n"}
# The class that loads a model of an architecture with this ending; none of the automatic classes loads the last.
_CLASSES = {
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForImageClassification": "AutoModelForImageClassification",
    "DoubleHeadsModel": "",
}
# A longer table is folded.
_LONG = 24


def card_files(
    report: CompressionReport,
    config: Mapping[str, Any],
    source: StrPath | None,
    *,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The card and its figure, by their names.

    `config` is that of the result; `source` is the directory of the model that was compressed, for the metadata that
    are carried over, or None where that is not known.
    """
    return {CARD_FILE: model_card(report, config, source, evaluation), FIGURE_FILE: report_figure(report)}


def model_card(
    report: CompressionReport,
    config: Mapping[str, Any],
    source: StrPath | None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card; arguments as for `card_files`."""
    model_type = str(config.get("model_type") or "unknown")
    architectures = config.get("architectures")
    loader = auto_class(str(architectures[0]) if architectures else "")
    kinds = {kind_of(matrix.spec) for matrix in report.matrices}
    tags = ["low-rank"] * any("low rank" in kind or kind == "mixed sum" for kind in kinds)
    tags += ["kronecker"] * bool(kinds & {"Kronecker sum", "mixed sum"}) + ["int8"] * (report.dtype == "int8")
    task = "text-generation" if loader == "AutoModelForCausalLM" else None
    front = metadata(source, [model_type, *tags], pipeline_tag=task)
    name = report.source or model_type
    made = f"Made from {_code(name)} by tqcompressor {report.version}"
    search = f", effort {_code(report.effort)}, seed {report.seed}" if report.effort is not None else ""
    stored = f", stored as {report.dtype}" if report.dtype else ""
    share = 100 * report.parameters_after / max(report.parameters_before, 1)
    parts = [
        front + MARK,
        f"# {_text(name)}, compressed",
        f"A checkpoint of type {_code(model_type)} of which {len(report.matrices)} matrices were replaced by low-rank "
        "products, by sums of Kronecker products with permuted rows and columns, or by sums of both: "
        f"{report.parameters_before:,} parameters became {report.parameters_after:,} ({share:.1f} %). "
        f"{made}{search}{stored}.",
        f"![Parameters kept and energy lost, matrix by matrix]({FIGURE_FILE})",
        _table([["", "before", "after", "kept"], *figures_of(report, evaluation)]),
        "## Loading",
        '```sh\npip install "tqcompressor[hf]"\n```',
        "```python\nimport tqcompressor  # teaches transformers this format\n"
        f"from transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("path/to/this/directory")\n```',
        "Without `import tqcompressor`, transformers refuses to load it.",
        *(_quoted(line) for line in (report.note or "").splitlines()),
        "## How it was made",
        _table([["", ""], *facts_of(report)]),
    ]
    if report.command is not None:
        parts += ["The same again:", _fenced(report.command)]
    parts += [
        "## What was done",
        "A matrix `W` (in × out) with a *block* became `W[p][:, q] ≈ Σ A_k ⊗ B_k`, every `B_k` of the block's shape. "
        f"Lost energy is `‖W − Ŵ‖² / ‖W‖²`{', in the norm of the calibration' if report.calibrated else ''}."
        f"{_readings(report)} Everything else is unchanged. These figures are those of the compression: training after "
        "it does not show in them.",
        _matrices(report),
    ]
    return "\n\n".join(parts) + "\n"


def figures_of(report: CompressionReport, evaluation: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The sizes of a model before and after, and its perplexities where they were measured, as rows of a table."""
    counts = {
        "parameters": (report.parameters_before, report.parameters_after),
        "bytes of weights": (report.bytes_before, report.bytes_after),
        "MACs for one token, these matrices": macs_of(report),
    }
    rows = []
    for name, (before, after) in counts.items():
        if after is not None:
            known = before if before else None
            share = "" if known is None else f"{after / known:.1%}"
            rows.append([name, "" if before is None else f"{before:,}", f"{after:,}", share])
    return rows + scores_of(evaluation)


def macs_of(report: CompressionReport) -> tuple[int | None, int | None]:
    """The MACs for one token of the matrices together, before and after; None where they were not counted."""
    pairs = [(matrix.macs_before, matrix.macs_after) for matrix in report.matrices]
    before = [first for first, _ in pairs if first is not None]
    after = [second for _, second in pairs if second is not None]
    whole = pairs and len(before) == len(after) == len(pairs)
    return (sum(before), sum(after)) if whole else (None, None)


def scores_of(evaluation: Mapping[str, Any] | None) -> list[list[str]]:
    """The perplexities of an evaluation, as `Comparison.to_dict` has them, as rows of a table."""
    models = (evaluation or {}).get("models") or []
    if not models:
        return []
    after, before = models[0], models[1] if len(models) > 1 else {}
    tokens = after["text"]["tokens"]
    name = evaluation.get("text") if evaluation is not None else None
    on = f" on {tokens:,} tokens" + (f" of {name}" if name else "")
    rows = []
    for key, digits in (("perplexity", 2), ("bits_per_byte", 4)):
        cells = [row.get("text", {}).get(key) for row in (before, after)]
        shown = ["" if value is None else f"{float(value):,.{digits}f}" for value in cells]
        rows.append([key.replace("_", " ") + (on if key == "perplexity" else ""), *shown, ""])
    return rows


def facts_of(report: CompressionReport, code: Callable[[str], str] | None = None) -> list[list[str]]:
    """How a compression was made, as rows `[name, value]`.

    `code` marks names, which may hold anything, in the markup of the caller; by default it is Markdown.
    """
    code = code or _code
    norm = "of the calibration" if report.calibrated else "Frobenius"
    asked = f", objective {code(report.objective)}" if report.objective not in (None, "auto") else ""
    rows = [["norm of errors", norm + asked]]
    if (record := report.calibration) is not None:
        gradients = ", with gradients" if record.sensitivity else ""
        rows.append(["calibration", f"{_tokens(record, code)}, seed {record.seed}{gradients}"])
    if report.budget is not None:
        rows.append(["budget", code(str(report.budget))])
    if report.effort is not None:
        rows.append(["search", f"effort {code(report.effort)}, seed {report.seed}"])
    versions = {"tqcompressor": report.version, **(report.versions or {})}
    rows.append(["versions", code(", ".join(f"{name} {version}" for name, version in versions.items()))])
    return rows


def metadata(source: StrPath | None, tags: Sequence[str], *, pipeline_tag: str | None = None) -> str:
    """The front matter of a card, as the Hub reads it.

    Licence, language, data sets and base model are those that the card of `source` states. A source from the hub is
    itself the base model. A licence's file counts where no card names it; without either, none is stated.
    """
    entries = {} if source is None else _stated(Path(source))
    if source is not None and (hub_id := _core.hub_id(Path(source).absolute())) is not None:
        entries |= {"base_model": hub_id, "base_model_relation": "quantized"}
    if pipeline_tag is not None:
        entries.setdefault("pipeline_tag", pipeline_tag)
    lines = ["library_name: transformers"]
    for key in _CARRIED:
        value = entries.get(key)
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_scalar(item)}" for item in value)]
        elif value:
            lines.append(f"{key}: {_scalar(value)}")
    lines += ["tags:", *(f"- {_scalar(tag)}" for tag in dict.fromkeys(["tqcompressor", *tags]))]
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def auto_class(architecture: str) -> str:
    """The class of transformers that loads a model of this architecture."""
    for ending, loader in _CLASSES.items():
        if architecture.endswith(ending):
            return loader or architecture
    return "AutoModel"


def record_evaluation(folder: StrPath, evaluation: Mapping[str, Any]) -> None:
    """Keeps the scores of a compressed checkpoint in its folder, and writes its card anew with them.

    Args:
        folder: The folder of a checkpoint that was compressed by this package.
        evaluation: `Comparison.to_dict()`, the compressed model first and its teacher second, if there is one; with
            the name of the text as `text`, if it shall be known.

    Raises:
        CheckpointError: The folder has no report of a compression.
        StorageError: The operating system refused.

    Example:
        >>> from pathlib import Path
        >>> from tqcompressor import NativeModel, compress_checkpoint
        >>> from tqcompressor.evaluate import Comparison
        >>> report = compress_checkpoint("tests/data/tiny-gpt2", "tiny-gpt2-compressed", budget=0.65)
        >>> row = NativeModel.from_pretrained("tiny-gpt2-compressed").score("He looked at her, and she at the door.")
        >>> record_evaluation("tiny-gpt2-compressed", Comparison((row,)).to_dict())
    """
    path = Path(folder)
    report, config = report_in(path), read_config(path)
    with WholeFile(path / EVALUATION_FILE) as file:
        file.write((json.dumps(evaluation, indent=2, allow_nan=False) + "\n").encode())
    # Its own card has what was carried over from the source.
    _write(path, {CARD_FILE: model_card(report, config, path, evaluation)})


def report_in(folder: Path) -> CompressionReport:
    """The report of the compressed checkpoint in a folder; raises `CheckpointError` where there is none."""
    try:
        return read_report(folder / REPORT_FILE)
    except OSError as error:
        raise CheckpointError(
            f"{folder / REPORT_FILE}: {error.strerror}: expected the folder of a compressed checkpoint"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` in a folder; raises `CheckpointError` where it is none."""
    try:
        config = read_json(folder / "config.json")
    except OSError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected an object")
    return config


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `record_evaluation` kept in a folder; None where there is nothing, or nothing of its form."""
    try:
        found = read_json(folder / EVALUATION_FILE)
        scores_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def write_card(folder: Path, report: CompressionReport, source: StrPath | None) -> None:
    """Writes the report, the card and its figure into the folder of a checkpoint that is complete otherwise.

    A card that this package did not write stays.
    """
    files = {REPORT_FILE: report.to_json() + "\n", **card_files(report, read_config(folder), source)}
    _write(folder, files)


def source_of(name: str | None) -> str | None:
    """The directory of the model that was loaded by this name, also in the hub's cache; None without one."""
    if not name:
        return None
    return name if Path(name).is_dir() else cached_directory(name)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        if name == CARD_FILE and not _is_ours(path):
            continue
        with WholeFile(path) as file:
            file.write(text.encode("utf-8", "replace"))


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return True
    return MARK in text or _TEMPLATE in text


def _stated(source: Path) -> dict[str, str | list[str]]:
    """The metadata that the card of a source states and that hold for its compressed form, too."""
    try:
        front = _FRONT.match(decoded((source / CARD_FILE).read_bytes()))
    except (OSError, ValueError):
        front = None
    found = {} if front is None else _entries(front[1])
    if "license" not in found:
        for key in ("license_name", "license_link"):
            found.pop(key, None)
        names = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
        if (file := next((name for name in names if _LICENSES.fullmatch(name)), None)) is not None:
            found |= {"license": "other", "license_name": "license-of-the-source", "license_link": file}
    return found


def _entries(front: str) -> dict[str, str | list[str]]:
    """The entries of a front matter that are carried over: plain text, or lists of it.

    This is the part of YAML that cards use for them. An entry of any other form is left out.
    """
    found: dict[str, str | list[str]] = {}
    lines = front.splitlines()
    for number, text in enumerate(lines):
        entry = _ENTRY.fullmatch(text.rstrip())
        if entry is None or entry[1] not in _CARRIED or entry[1] in found:
            continue
        value = _without_comment(entry[2] or "")
        items: list[str] = []
        for item in lines[number + 1 :]:
            if item.strip() and not item.startswith((" ", "\t", "-")):
                break
            items.append(item)
        if value.startswith("[") and value.endswith("]") and not items:
            values = [_plain_text(item) for item in value[1:-1].split(",")]
        elif not value:
            matched = [_ITEM.fullmatch(item) for item in items if item.strip()]
            values = [None if item is None else _plain_text(_without_comment(item[1])) for item in matched]
        elif not any(item.strip() for item in items) and (single := _plain_text(value)) is not None:
            found[entry[1]] = single
            continue
        else:
            continue
        if values and all(values):
            found[entry[1]] = [each for each in values if each is not None]
    return found


def _without_comment(value: str) -> str:
    return re.sub(r"(^|\s)#.*", "", value).strip() if value[:1] not in "'\"" else value.strip()


def _plain_text(value: str) -> str | None:
    """The text of a YAML scalar; None for one that is more than that."""
    value = value.strip()
    if quoted := re.fullmatch(r"'([^'\\]*)'|\"([^\"\\]*)\"", value):
        return quoted[1] if quoted[1] is not None else quoted[2]
    # What has a meaning in YAML at the beginning of a value, or within it.
    odd = value[:1] in "&*!|>%@`{}[],?-'\"" or ": " in value or value.endswith(":")
    return None if odd or not value.isprintable() else value


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT else json.dumps(text)


def _readings(report: CompressionReport) -> str:
    """What a calibration was measured on, as a sentence."""
    if (record := report.calibration) is None:
        return ""
    gradients = " and gradients" if record.sensitivity else ""
    return f" Inputs{gradients} were measured on {_tokens(record, _code)}."


def _tokens(record: CalibrationRecord, code: Callable[[str], str]) -> str:
    """How many tokens a calibration read, of which texts."""
    texts = ", ".join(f"{tokens:,} of {code(name)}" for name, tokens in record.texts.items())
    return f"{record.tokens:,} tokens{': ' + texts if texts else ''}"


def _matrices(report: CompressionReport) -> str:
    rows = [["matrix", "shape", "became", "parameters", "lost energy"]]
    for matrix in report.matrices:
        spec = matrix.spec
        lost = "" if matrix.lost_energy is None else f"{matrix.lost_energy:.4f}"
        rows.append(
            [
                _code(matrix.name),
                " × ".join(map(str, matrix.shape)),
                "stays dense" if spec is None else describe(spec),
                f"{matrix.parameters_before:,} → {matrix.parameters_after:,}",
                lost,
            ]
        )
    table = _table(rows)
    if len(report.matrices) <= _LONG:
        return table
    return f"<details>\n<summary>{len(report.matrices)} matrices</summary>\n\n{table}\n\n</details>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _quoted(note: str) -> str:
    """A line of a report's note, which holds names of matrices, as a quotation without HTML and links."""
    return "> " + re.sub(r"([\\\\<>\[\]&])", r"\\\1", note)


def _fenced(text: str) -> str:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    language = "sh" if text.startswith("tqcompressor ") else "python"
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str | None) -> str:
    """Text as code within a line, whatever it holds."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text or "").split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (1 + max(len(run) for run in re.findall("`+", line)))
    return f"{fence} {line} {fence}"


def _text(text: str) -> str:
    """Text within a line that is neither Markdown nor HTML, whatever it holds."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(text.split()))
