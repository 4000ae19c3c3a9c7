"""The benchmark of the published table: its protocol, its models and their sizes, on the small GPT-2."""

import argparse
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tqcompressor
from helpers.spoiling import copied
from transformers import AutoModelForCausalLM, AutoTokenizer

TESTS = Path(__file__).resolve().parents[2]
TINY = TESTS / "data" / "tiny-gpt2"


@pytest.fixture(scope="module")
def paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS / "benchmarks"))
        yield import_module("paper")


@pytest.fixture
def run(paper, tmp_path, monkeypatch):
    monkeypatch.setenv("TQCOMPRESSOR_CACHE", str(tmp_path / "cache"))

    def rows(*arguments):
        parser = argparse.ArgumentParser()
        paper.add_options(parser)
        return {row["model"]: row for row in paper.run(parser.parse_args([*map(str, arguments), "--effort", "fast"]))}

    return rows


@pytest.fixture
def sets(tmp_path):
    """WikiText's lines, and passages of LAMBADA."""
    wikitext, lambada = tmp_path / "wiki.test.tokens", tmp_path / "lambada.jsonl"
    wikitext.write_text(" \n = A heading = \n \n He looked at the <unk> , and went . \n She did not . \n" * 9)
    lambada.write_text("".join(json.dumps({"text": f"He looked at her {number}."}) + "\n" for number in range(9)))
    return wikitext, lambada


def test_texts_are_joined_as_the_published_figures_have_them(paper, sets, tmp_path):
    wikitext, lambada = sets
    found = paper.text_of(wikitext, "WikiText-2")
    assert found.startswith(
        "\n\n = A heading = \n\n\n\n\n He looked at the <unk> , and went . \n\n\n She did not . \n\n\n\n\n = A"
    )
    assert paper.text_of(lambada, "LAMBADA") == "\n\n".join(f"He looked at her {number}." for number in range(9))
    plain = tmp_path / "lambada.txt"
    plain.write_text("one passage .\n\nanother\n")
    assert paper.text_of(plain, "LAMBADA") == "one passage .\n\nanother"


def test_the_table(run, paper, sets, tmp_path, monkeypatch):
    wikitext, lambada = sets
    taken = []

    def convert(source, out, **options):
        taken.append((source, options))
        copied(TINY, out)

    monkeypatch.setattr(tqcompressor, "convert_checkpoint", convert, raising=False)
    options = ["--wikitext2", wikitext, "--lambada", lambada, "--tq", "tq.bin", "--distilgpt2", TINY]
    options += ["--text", TINY / "calibration.txt", "--num-samples", 2, "--tokens", 2048, "--batch-size", 4]
    rows = run(*options, "--out", tmp_path / "students")
    ours = ["recipe", "recipe, calibrated", "budget, calibrated", "recipe, healed", "budget, healed"]
    measured = ["GPT-2", "DistilGPT-2", "TQCompressedGPT-2", *(f"ours, {name}" for name in ours)]
    assert list(rows) == [*measured, "Krony-PT", "KnGPT-2"]
    # One table: every row has the same columns.
    assert {tuple(row) for row in rows.values()} == {tuple(rows["GPT-2"])}
    assert taken == [(Path("tq.bin"), {"config": TINY / "config.json", "overwrite": True})]

    model, tokenizer = (kind.from_pretrained(TINY) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(paper.text_of(wikitext, "WikiText-2"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [model.float()(part, labels=part).loss for part in ids.split(128, 1) if part.shape[1] > 1]
    expected = float(torch.stack(losses).mean().exp())
    for name in measured[:3]:
        assert rows[name]["parameters"] == 5_289_472 and rows[name]["WikiText-2"] == pytest.approx(expected, rel=1e-3)
    size = tqcompressor.inspect(TINY, "tq-81m").parameters_after
    for name in ours:
        parameters = rows[f"ours, {name}"]["parameters"]
        assert parameters == size if "recipe" in name else 0.99 * size < parameters <= size
    assert rows["ours, budget, calibrated"]["LAMBADA"] < rows["ours, recipe"]["LAMBADA"]
    assert rows["ours, recipe, healed"]["LAMBADA"] != rows["ours, recipe"]["LAMBADA"]
    columns = ("WikiText-2, published", "LAMBADA, published")
    assert [rows["TQCompressedGPT-2"][column] for column in columns] == [32.25, 64.72]
    assert [rows["Krony-PT"][column] for column in ("WikiText-2", *columns)] == ["–", 34.99, 64.92]


def test_without_a_set_there_is_nothing_to_measure(run):
    with pytest.raises(SystemExit, match="--wikitext103 FILE, --wikitext2 FILE, --lambada FILE"):
        run()
