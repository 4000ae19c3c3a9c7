"""The HTML page about a result: its content, and that it loads nothing, whatever the names in it hold."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.checkpoints import Checkpoint
from tqcompressor import compress_checkpoint, html_report, inspect, record_evaluation
from tqcompressor.cli.main import main
from tqcompressor.errors import CheckpointError, DestinationError
from tqcompressor.frontier.results import SweepResult, SweepRow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVILS = {
    "script": '<script src="http://evil.example/x.js">fetch("http://evil.example")</script>',
    "image": '"><img src=//evil.example/x onerror=alert(1)>',
    "end": "</title></style></svg></pre></code><iframe src='http://evil.example'></iframe>",
    "style": "x;background:url(http://evil.example)\x00\x1b]\ud800",
}
# Attributes that make a browser load or run something.
LOADING = {"src", "srcset", "data", "action", "formaction", "poster", "background", "ping", "xlink:href"}
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "p", "div", "b", "i", "span", "aside"),
    *("table", "thead", "tbody", "tr", "th", "td", "code", "pre", "figure", "footer"),
    *("svg", "rect", "text", "line", "circle", "polyline"),
}
SCORES = {
    "models": [
        {"name": "a", "text": {"tokens": 12, "perplexity": 53.04, "bits_per_byte": 1.5}},
        {"name": "b", "text": {"tokens": 12, "perplexity": 51.46, "bits_per_byte": 1.4}},
    ],
    "text": "evaluation.txt",
}


class Reader(HTMLParser):
    """Reads a page: its text, and its elements with their attributes; every element is closed in its order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.words, self.elements, self.opened = [], [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if "style" not in self.opened:
            self.words.append(data)


def read(path):
    """The text of a page that loads nothing and runs nothing."""
    reader = Reader()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    reader.close()
    assert not reader.opened and {tag for tag, _ in reader.elements} <= ELEMENTS
    for tag, attributes in reader.elements:
        assert not attributes.keys() & LOADING and not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("href", "data:,") == "data:,"
        assert "url(" not in (attributes.get("style") or "") and "@import" not in (attributes.get("style") or "")
    (policy,) = [each["content"] for _, each in reader.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "url(" not in re.search("(?s)<style>.*?</style>", text)[0]
    return " ".join(" ".join(reader.words).split())


def swept(source="small", budgets=(0.5, "70%")):
    rows = tuple(
        SweepRow(budget, 1000 + number, 5000 + number, 900, 80.5 - number, 1311.0, 0.5, {})
        for number, budget in enumerate(budgets)
    )
    dense = SweepRow(None, 2000, 9000, 1800, 51.5, 510.0, 0.0, {})
    return SweepResult("0.1.0", source, "perplexity", "held.txt", "native", True, dense, rows, True, {})


@pytest.fixture
def folder(tmp_path):
    source = Checkpoint(width=32, vocabulary=60).write(tmp_path / "small")
    compress_checkpoint(source, tmp_path / "out", budget=0.6, effort="balanced", progress=False)
    return tmp_path / "out"


def test_the_page_has_the_plan_the_sizes_the_scores_and_the_budgets(folder, tmp_path, capsys):
    report, page = inspect(folder), tmp_path / "page.html"
    html_report(folder, page)
    plain = read(page)
    record_evaluation(folder, SCORES)
    (tmp_path / "sweep.json").write_text(swept().to_json())
    assert main(["report", str(folder), "--html", str(page), "--sweep", str(tmp_path / "sweep.json")]) == 0
    assert str(page) in capsys.readouterr().out
    full = read(page)
    for text in (plain, full):
        assert "small, compressed" in text and "wte" in text and "Budgets side by side" in full
        for matrix in report.matrices:
            row = f"{matrix.parameters_before:,} {matrix.parameters_after:,}"
            assert matrix.name in text and row in text and f"{matrix.macs_after:,}" in text
            assert f"{matrix.lost_energy:.4f}" in text
        assert f"{report.bytes_before:,} {report.bytes_after:,}" in text
        assert report.command in text and report.note.splitlines()[0] in text
    assert "perplexity on 12 tokens of evaluation.txt 51.46 53.04" in full and "53.04" not in plain
    assert "held.txt" in full and "1,311" in full and "70%" in full and "held.txt" not in plain
    html_report(folder, tmp_path / "again.html", sweep=tmp_path / "sweep.json")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_sweep_alone_has_a_page(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(swept().to_json())
    html_report(tmp_path / "sweep", tmp_path / "page.html")
    text = read(tmp_path / "page.html")
    assert "small: a sweep of budgets" in text and "80.50" in text and "Layer by layer" not in text


@pytest.mark.parametrize("evil", EVILS.values(), ids=EVILS.keys())
def test_no_name_becomes_markup(evil, folder, tmp_path):
    report = inspect(folder)
    matrices = tuple(replace(matrix, name=f"{evil}{number}") for number, matrix in enumerate(report.matrices))
    named = {"source": evil, "note": evil, "command": evil, "version": evil, "effort": evil, "objective": evil}
    report = replace(report, matrices=matrices, versions={evil: evil}, budget=evil, **named)
    (folder / "compression_report.json").write_text(report.to_json())
    (folder / "sweep.json").write_text(replace(swept(evil, (evil, 0.7)), heldout=evil, engine=evil).to_json())
    scores = {**SCORES, "text": evil}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    html_report(folder, tmp_path / "page.html")
    text = read(tmp_path / "page.html")
    shown = " ".join(re.sub("[\x00\x1b\ud800]", "", evil).split())
    assert re.sub("[�?]", "", text).count(re.sub("[�?]", "", shown)) >= 5


def test_many_matrices_stay_within_a_frame(folder, tmp_path):
    report = inspect(folder)
    rows = tuple(replace(report.matrices[number % 3], name=f"model.layers.{number}.mlp") for number in range(300))
    (folder / "compression_report.json").write_text(replace(report, matrices=rows).to_json())
    html_report(folder, tmp_path / "page.html")
    assert "model.layers.299.mlp" in read(tmp_path / "page.html") and (tmp_path / "page.html").stat().st_size < 400_000


def test_refusals_leave_nothing(folder, tmp_path):
    page = tmp_path / "page.html"
    wrong = tmp_path / "wrong.json"
    cases = [
        ((tmp_path / "nowhere", page), {}, CheckpointError, "no such directory"),
        ((tmp_path / "small", page), {}, CheckpointError, r"compression_report\.json"),
        ((folder, tmp_path), {}, DestinationError, "is a folder"),
        ((folder, page), {"sweep": wrong}, CheckpointError, "not the result of a sweep"),
        ((folder, page), {"evaluation": wrong}, CheckpointError, "not the output of evaluate"),
        ((folder, page), {"sweep": tmp_path / "none.json"}, OSError, "none"),
    ]
    for content in ("[]", "{", '{"models": [{"text": 3}]}'):
        wrong.write_text(content)
        for arguments, options, error, words in cases:
            with pytest.raises(error, match=words):
                html_report(*arguments, **options)
    assert not page.exists()
    (folder / "training_report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a report of a distillation"):
        html_report(folder, page)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_and_asks_for_nothing(folder, tmp_path):
    (folder / "sweep.json").write_text(swept(EVILS["script"]).to_json())
    html_report(folder, tmp_path / "page.html")
    log, shot = tmp_path / "net.json", tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # No host is found, so that nothing can leave the machine.
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run"]
    uri = (tmp_path / "page.html").as_uri()
    dumped = _run([*options, "--dump-dom", uri])
    _run([*options, f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=800,1200", uri])
    assert "Layer by layer" in dumped and dumped.count("<rect") > 10 and "<script" not in dumped
    assert shot.stat().st_size > 10_000
    assert "evil.example" not in log.read_text(errors="replace").replace("%3C", "<")


def _run(options):
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
