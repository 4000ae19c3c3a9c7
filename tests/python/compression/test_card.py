"""The model card of a compressed checkpoint: its metadata, its figure, and the same from disk and from a live model."""

import copy
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers.checkpoints import Checkpoint, config
from helpers.models import CONFIG, tiny_model
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import metadata_load
from tqcompressor import compress, compress_checkpoint, inspect, recompress, record_evaluation
from tqcompressor.cli.main import main
from tqcompressor.compression.card import MARK, metadata, model_card
from tqcompressor.compression.figure import report_figure
from tqcompressor.errors import CheckpointError, StorageError

SPECS = config({"h.*.mlp.*": ((2, 4), 2, "rows"), "wte": ((2, 2), 1, "none")})
EVIL = 'h.0.</title><script>alert("x")</script>|`[a](javascript:b)\n# c'


def card_of(folder):
    """The metadata of a card as the Hub's own reader has them."""
    assert metadata_load(folder / "README.md") == ModelCard.load(folder / "README.md").data.to_dict()
    return metadata_load(folder / "README.md")


CARRIED = {
    "plain": ("license: mit\nlanguage: en", {"license": "mit", "language": "en"}),
    "lists": (
        "license: apache-2.0 # free\nlanguage:\n- en\n- no\ndatasets: [a/b, 'c']",
        {"license": "apache-2.0", "language": ["en", "no"], "datasets": ["a/b", "c"]},
    ),
    "named": (
        'license: other\nlicense_name: "gemma terms"\nlicense_link: https://x.y/z?a=1',
        {"license": "other", "license_name": "gemma terms", "license_link": "https://x.y/z?a=1"},
    ),
    "base": ("base_model:\n  - me/base\nbase_model_relation: finetune", {"base_model": ["me/base"]}),
    "task": ("pipeline_tag: feature-extraction", {"pipeline_tag": "feature-extraction"}),
    "nothing": ("tags:\n- mine\nwidget:\n- text: hello\n  license: mit", {}),
    "not plain": ("license: &a mit\nlanguage: {a: b}\ndatasets:\n- text: x", {}),
    "no value": ("license:\nlanguage: ''", {}),
    "no YAML": ("license: 'mit\n\tlanguage: en\n: :", {}),
}


@pytest.mark.parametrize("front, expected", CARRIED.values(), ids=CARRIED.keys())
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_metadata_are_carried_over_and_none_is_invented(front, expected, newline, tmp_path):
    (tmp_path / "README.md").write_bytes(f"---\n{front}\n---\n# text\nlicense: gpl\n".replace("\n", newline).encode())
    found = yaml.safe_load(metadata(tmp_path, ["gpt2"]).split("---\n")[1])
    assert found.pop("library_name") == "transformers" and found.pop("tags") == ["tqcompressor", "gpt2"]
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - {"base_model_relation"} == expected.keys()


def test_without_metadata_a_licence_file_is_named_and_without_one_nothing(tmp_path):
    for card in (
        None,
        b"no front matter\nlicense: mit\n",
        "---\nlicense: mit\n---\n".encode("utf-16"),
        b"\xff\xfe\x00",
    ):
        if card is not None:
            (tmp_path / "README.md").write_bytes(card)
        assert "license" not in metadata(tmp_path, []) and "base_model" not in metadata(tmp_path, [])
    (tmp_path / "LICENSE.txt").write_text("free")
    found = yaml.safe_load(metadata(tmp_path, []).split("---\n")[1])
    assert (found["license"], found["license_link"]) == ("other", "LICENSE.txt")
    assert "license" not in metadata(None, [])


@pytest.mark.parametrize("odd", ["no", "a: b", "'", "#x", "", "[a]", "é\n- b", "true"])
def test_a_tag_is_one_tag_whatever_it_holds(odd):
    assert yaml.safe_load(metadata(None, [odd]).split("---\n")[1])["tags"] == ["tqcompressor", odd]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in the hub's cache, with a card."""
    folder = tmp_path_factory.mktemp("hub") / "models--me--small" / "snapshots" / "abc"
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nmine\n")
    return folder


@pytest.fixture(scope="module")
def on_disk(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "out"
    compress_checkpoint(source, out, CONFIG, progress=False)
    return out


@pytest.fixture
def live(source):
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    compress(model, CONFIG)
    return model


def test_a_live_model_has_the_card_of_the_checkpoint_on_disk(live, on_disk, tmp_path):
    live.save_pretrained(tmp_path / "live")
    cards = [(folder / "README.md").read_text() for folder in (on_disk, tmp_path / "live")]
    # They differ in how they are made, and so in the versions of what makes them.
    made = re.compile(r"\| versions \|.*|```(sh|python)\ntqcompressor.*")
    assert made.sub("", cards[0]) == made.sub("", cards[1]) and len(made.findall(cards[1])) == 2
    assert (on_disk / "lost_energy.svg").read_bytes() == (tmp_path / "live" / "lost_energy.svg").read_bytes()
    front = card_of(tmp_path / "live")
    assert front == card_of(on_disk)
    assert (front["license"], front["language"], front["base_model"]) == ("mit", "en", "me/small")
    assert (front["base_model_relation"], front["library_name"]) == ("quantized", "transformers")
    assert "kronecker" in front["tags"] and "low-rank" not in front["tags"]
    first, second = (inspect(folder).to_dict() for folder in (on_disk, tmp_path / "live"))
    for entry in (first, second):
        assert all(matrix["macs_after"] > 0 for matrix in entry["matrices"])
    same = ("parameters_after", "bytes_before", "bytes_after", "source")
    assert [first[name] for name in same] == [second[name] for name in same]


def test_a_loaded_model_is_saved_with_its_card_and_one_that_changed_with_none(live, on_disk, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(on_disk)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (on_disk / "README.md").read_bytes()
    # A copy keeps it; a part, other shapes, a second compression and a stock model are no longer what the report says.
    copy.deepcopy(live).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").exists()
    live.save_pretrained(tmp_path / "not-main", is_main_process=False)
    again, resized = copy.deepcopy(live), copy.deepcopy(live)
    recompress(again, config({"h.0.mlp.c_fc": ((2, 4), 1, "none")}))
    again.save_pretrained(tmp_path / "twice")
    resized.lm_head = None
    resized.transformer.wpe = torch.nn.Embedding(3, resized.config.n_embd)
    resized.save_pretrained(tmp_path / "resized")
    live.dequantize()
    live.save_pretrained(tmp_path / "stock")
    for name in ("not-main", "twice", "resized", "stock"):
        assert not (tmp_path / name / "README.md").exists() and (tmp_path / name).exists(), name


def test_a_model_that_is_compressed_on_loading_has_its_card(source, on_disk, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "out")
    assert card_of(tmp_path / "out") == card_of(on_disk) and inspect(tmp_path / "out").source == "me/small"


def test_a_card_that_cannot_be_written_does_not_keep_a_model_from_being_saved(live, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise StorageError(28, "No space left on device", "README.md")

    monkeypatch.setattr("tqcompressor.compression.live_card.write_card", refuse)
    with pytest.warns(UserWarning, match="is saved, but not its model card: .*No space"):
        live.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_card_of_someone_else_stays_and_ours_is_renewed(live, on_disk, tmp_path):
    for text, stays in (("mine", True), (f"{MARK}\nold", False)):
        folder = tmp_path / ("mine" if stays else "ours")
        folder.mkdir()
        (folder / "README.md").write_text(text)
        live.save_pretrained(folder)
        assert ((folder / "README.md").read_text() == text) == stays
        assert (folder / "lost_energy.svg").exists() and inspect(folder).parameters_after > 0
    assert (tmp_path / "ours" / "README.md").read_text().count(MARK) == 1


@pytest.fixture
def uploaded(monkeypatch):
    """The files of commits to a hub that is not there."""
    files = {}

    def commit(self, repo_id, operations, **_options):
        files.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    class Repository:
        repo_id = "me/pushed"

    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
    cards = {"card": None}

    def load(repo_id, *_, **__):
        if cards["card"] is None:
            # Its constructor wants the response of a server.
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return ModelCard(cards["card"])

    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", load)
    return files, cards


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_was_saved_can_be_pushed(way, live, on_disk, uploaded, tmp_path):
    files, cards = uploaded

    def push(model):
        files.clear()
        if way == "push_to_hub":
            model.push_to_hub("me/pushed")
        else:
            model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="me/pushed")

    for model in (live, transformers.AutoModelForCausalLM.from_pretrained(on_disk)):
        push(model)
        assert files.keys() >= {"README.md", "lost_energy.svg", "compression_report.json", "model.safetensors"}
        card = files["README.md"].decode()
        assert MARK in card and yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    # The card that someone wrote in the repository stays.
    cards["card"] = "---\nlicense: mit\n---\nwritten by hand"
    push(live)
    assert "written by hand" in files["README.md"].decode() and "lost_energy.svg" in files


def test_names_with_markup_are_text_in_the_card_and_the_figure(on_disk):
    report = inspect(on_disk)
    first, *rest = report.matrices
    evil = replace(
        report,
        source=EVIL,
        matrices=(replace(first, name=EVIL), *rest),
        note=EVIL,
        command=f"tqcompressor compress '{EVIL}' ```",
        versions={EVIL: EVIL},
        effort=EVIL,
    )
    figure = ElementTree.fromstring(report_figure(evil))
    assert not list(figure.iter("{http://www.w3.org/2000/svg}script"))
    texts = [each.text for each in figure.iter("{http://www.w3.org/2000/svg}title")]
    assert EVIL in texts
    card = model_card(evil, {"model_type": EVIL, "architectures": [EVIL]}, None)
    assert yaml.safe_load(card.split("---\n")[1])["tags"][1] == EVIL
    body = card.split("---\n", 2)[2]
    # Markup stands within code, or is escaped. Blocks of code are left out first: all but their fences is text.
    outside = re.sub(r"(?ms)^(`{3,})\w*$.*?^\1$", "", body)
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"(?<!\\)<script", outside) and not re.search(r"(?<!\\)\]\(javascript", outside)
    assert not re.search(r"(?m)^# c", outside)


@pytest.mark.parametrize("count", [1, 64, 65, 300])
def test_the_figure_has_a_bar_for_every_matrix(count, on_disk):
    report = inspect(on_disk)
    rows = tuple(replace(report.matrices[0], name=f"h.{number}.mlp") for number in range(count))
    figure = ElementTree.fromstring(report_figure(replace(report, matrices=rows)))
    bars = [each for each in figure.iter("{http://www.w3.org/2000/svg}rect") if each.get("fill-opacity") == "0.3"]
    assert len(bars) == count and float(figure.get("height")) < 2200
    assert report_figure(report) == report_figure(report)


def test_scores_are_kept_and_shown_in_the_card(on_disk, tmp_path, capsys):
    tiny = Path(__file__).parents[2] / "data" / "tiny-gpt2"
    out, text = tmp_path / "out", tmp_path / "short.txt"
    text.write_text("He looked at her, and she looked at the door.")
    compress_checkpoint(tiny, out, budget=0.8, progress=False)
    before = (out / "README.md").read_text()
    evaluate = ["evaluate", str(out), "--teacher", str(tiny), "--text", str(text), "--engine", "native", "--json"]
    assert main([*evaluate, "--record"]) == 0
    printed = json.loads(capsys.readouterr().out)
    after, original = (f"{row['text']['perplexity']:,.2f}" for row in printed["models"])
    card = (out / "README.md").read_text()
    assert f"| perplexity on 12 tokens of short.txt | {original} | {after} |  |" in card
    assert json.loads((out / "evaluation.json").read_text())["models"] == printed["models"]
    assert [line for line in card.splitlines() if "perplexity" not in line and "bits per byte" not in line] == (
        before.splitlines()
    )
    # A result with scores may be overwritten, and scores are not those of the next one.
    compress_checkpoint(tiny, out, budget=0.8, overwrite=True, progress=False)
    assert not (out / "evaluation.json").exists() and (out / "README.md").read_text() == before
    with pytest.raises(CheckpointError, match=r"compression_report\.json"):
        record_evaluation(tiny, {"models": []})
    assert main(["evaluate", str(tiny), "--text", str(text), "--engine", "native", "--record"]) == 2
    assert not (tiny / "evaluation.json").exists()


def test_the_command_in_the_card_makes_the_same_bytes(tmp_path, monkeypatch):
    source = Checkpoint(width=32, vocabulary=40).write(tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    options = {"budget": "70%", "matrices": ["h.*.mlp.*", "wte"], "max_macs": 0.9, "effort": "balanced", "seed": 3}
    report = compress_checkpoint(source, tmp_path / "first", **options, dtype="float16", progress=False)
    assert str(tmp_path) not in (tmp_path / "first" / "README.md").read_text()
    assert main(shlex.split(report.command)[1:]) == 0
    for name in ("model.safetensors", "README.md", "lost_energy.svg"):
        made = tmp_path / "my model-compressed" / name
        assert made.read_bytes() == (tmp_path / "first" / name).read_bytes(), name
