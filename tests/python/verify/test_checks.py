"""A good checkpoint passes every check, and each way to spoil one fails just the check that is about it."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch
import transformers
from helpers.corpora import TINY
from helpers.families import family_model
from helpers.spoiling import WEIGHTS, copied, with_json, with_tensors
from helpers.tokenizer import save_tokenizer
from tqcompressor import NativeModel, TQConfig, compress, compress_checkpoint, verify_checkpoint
from tqcompressor.config import LowRankSpec
from tqcompressor.errors import CheckpointError, ConfigError, DtypeError, TextError
from tqcompressor.verify import checks
from tqcompressor.verify.checks import CHECKS, Verification
from tqcompressor.verify.subject import Settings, Subject

# A fresh process takes seconds: it is tested on its own.
QUICK = [check for check in CHECKS.values() if check.name != "fresh-process"]
SIZED = [CHECKS[name] for name in ("files", "finite", "permutations", "tensors", "size")]
TEXT = (TINY / "evaluation.txt").read_text(encoding="utf-8")[:1200]
C_FC = "transformer.h.1.mlp.c_fc"
PERMUTATION = "transformer.h.0.mlp.c_proj.output_permutation"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The tiny GPT-2 by a calibrated budget."""
    folder = tmp_path_factory.mktemp("verify") / "good"
    compress_checkpoint(
        TINY,
        folder,
        budget=0.8,
        calibration=NativeModel.from_pretrained(TINY).calibrate(TEXT * 2, num_samples=3),
    )
    return folder


@pytest.fixture
def spoiled(good, tmp_path):
    return copied(good, tmp_path / "spoiled")


def results_of(source, only=QUICK, **options):
    verification = Verification(Subject(Settings(source, **options)))
    return {check.name: verification.result(check) for check in only}


def quality(**changes):
    return {"teacher": TINY, "text": TEXT, "stride": 128, **changes}


def statuses(results):
    return {name: result.status for name, result in results.items()}


def only_failure(results):
    """The one check that has failed; what builds on it may be blocked, and everything else has passed."""
    (name,) = (name for name, status in statuses(results).items() if status == "failed")
    blocked = [result for result in results.values() if result.status == "blocked"]
    assert all(result.detail == f"not measured, as `{name}` has failed" for result in blocked)
    return results[name]


def test_a_good_checkpoint(good):
    results = results_of(good, **quality())
    assert statuses(results) == {check.name: "passed" for check in QUICK} | {"embeddings": "skipped"}
    report = json.loads((good / "compression_report.json").read_text())
    assert results["size"].figures == {"parameters": report["parameters_after"], "bytes": report["bytes_after"]}
    # The calibration has read the text.
    assert 0.5 < results["perplexity"].figures["ratio"] < 1.1
    assert f"{results['perplexity'].figures['ratio']:.4f}" in results["perplexity"].detail


def flip(tensors):
    tensors[f"{C_FC}.left"] *= -1


def put(value):
    def change(tensors):
        tensors[f"{C_FC}.left"][3, 1] = value

    return change


def permute(order):
    def change(tensors):
        tensors[PERMUTATION] = order(tensors[PERMUTATION])

    return change


def replaced(index, value):
    return permute(lambda order: torch.cat([order[:index], torch.tensor([value]), order[index + 1 :]]))


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


TENSORS = {
    "a factor of the other sign": (flip, "perplexity", "expected at most 1.1"),
    "another permutation": (permute(lambda order: order.roll(1)), "perplexity", "expected at most 1.1"),
    "NaN": (put(math.nan), "finite", f"{C_FC}.left (1 of "),
    "infinity": (put(-math.inf), "finite", "1 of "),
    "an index beyond the permutation": (replaced(5, 10**6), "permutations", "1000000 is not from 0 to 255"),
    "a negative index": (replaced(5, -1), "permutations", "-1 is not from 0 to 255"),
    "an index twice": (permute(lambda order: order // 2 * 2), "permutations", PERMUTATION),
    "no permutation": (without(f"{C_FC}.input_permutation"), "tensors", f"{C_FC[12:]}.input_permutation is missing"),
    "no norm": (without("transformer.ln_f.weight"), "tensors", "transformer.ln_f.weight"),
    "no bias": (without(f"{C_FC}.bias", "transformer.h.0.ln_1.bias"), "tensors", f"{C_FC[12:]}.bias is missing"),
    "a longer bias": (
        lambda tensors: tensors.update({f"{C_FC}.bias": torch.ones(9)}),
        "tensors",
        "(1024,) as in config.json, got (9,)",
    ),
}


@pytest.mark.parametrize(("change", "check", "words"), TENSORS.values(), ids=TENSORS)
def test_spoiled_tensors(spoiled, change, check, words):
    with_tensors(spoiled, change)
    failure = only_failure(results_of(spoiled, **quality()))
    assert failure.name == check and words in failure.detail


def another_rank(spec):
    """Gives the first group of an embedding another rank."""
    (rows, rank), *others = spec["groups"]
    spec["groups"] = [[rows, rank - 1], *others]


CONFIGS = {
    "another rank": (lambda config: another_rank(config["quantization_config"]["specs"]["wte"]), "wte.left: expected"),
    "fewer positions": (lambda config: config.update(n_positions=64), "transformer.wpe.weight: expected (64, 256)"),
    "one more layer": (lambda config: config.update(n_layer=5), "transformer.h.4."),
    "another width": (lambda config: config.update(n_embd=128), "rank"),
}


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_other_sizes(spoiled, change, words):
    with_json(spoiled, "config.json", change)
    failure = only_failure(results_of(spoiled, **quality()))
    assert failure.name == "tensors" and words in failure.detail


REPORTS = {
    "parameters": (lambda report: report.update(parameters_after=1234), "parameters_after: expected 4,"),
    "bytes": (lambda report: report.update(bytes_after=1234), "got 1,234"),
    "a row": (lambda report: report["matrices"][2].update(parameters_after=1), "the parameters of all rows"),
    "a rank": (lambda report: another_rank(report["matrices"][0]), "wte: expected"),
    "no report": (lambda report: report.pop("matrices"), "not a compression report"),
}


@pytest.mark.parametrize(("change", "words"), REPORTS.values(), ids=REPORTS)
def test_a_report_of_another_size(spoiled, change, words):
    with_json(spoiled, "compression_report.json", change)
    failure = only_failure(results_of(spoiled, SIZED))
    assert failure.name == "size" and "compression_report.json" in failure.detail and words in failure.detail


def test_the_report_of_a_distillation(spoiled):
    report = {"stages": [{"trained": {"parameters": 7}}]}
    (spoiled / "training_report.json").write_text(json.dumps(report))
    assert "not a report of a distillation" in only_failure(results_of(spoiled, SIZED)).detail


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def emptied(folder):
    (folder / WEIGHTS).write_bytes(b"")


def removed(folder):
    (folder / WEIGHTS).unlink()


def indexed(name, file):
    def spoil(folder):
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys([name], file)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return spoil


FILES = {
    "truncated": (truncated, f"{WEIGHTS}: truncated or damaged"),
    "empty": (emptied, f"{WEIGHTS}: truncated or damaged"),
    "missing": (removed, "got neither"),
    "a shard is missing": (indexed("a", "model-2.safetensors"), "model-2.safetensors: No such file"),
    "a tensor is not in its shard": (indexed("a", "model-1.safetensors"), "missing by the index: a"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"n_'), "config.json: not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
}


@pytest.mark.parametrize(("spoil", "words"), FILES.values(), ids=FILES)
def test_spoiled_files(spoiled, spoil, words):
    spoil(spoiled)
    failure = only_failure(results_of(spoiled))
    assert failure.name == "files" and words in failure.detail


def test_shards_are_read(tmp_path):
    folder = tmp_path / "shards"
    compress_checkpoint(TINY, folder, "tq-81m", effort="fast", max_shard_size="2MB")
    results = results_of(folder, [CHECKS["files"], CHECKS["finite"], CHECKS["tensors"]])
    assert set(statuses(results).values()) == {"passed"} and " in 4 files" in results["files"].detail


def test_a_native_runtime_that_computes_something_else(good, monkeypatch):
    logits = NativeModel.logits
    monkeypatch.setattr(NativeModel, "logits", lambda self, ids: logits(self, ids) * np.float32(1.01))
    failure = only_failure(results_of(good))
    assert failure.name == "native" and "got 0.01" in failure.detail


def test_a_cache_that_changes_what_is_generated(good, monkeypatch):
    update = transformers.DynamicCache.update

    def spoilt(self, keys, values, *rest, **options):
        return update(self, keys, values * 1.1, *rest, **options)

    monkeypatch.setattr(transformers.DynamicCache, "update", spoilt)
    failure = only_failure(results_of(good))
    assert failure.name == "generation" and "with the cache" in failure.detail


@pytest.mark.parametrize("tensor", ["transformer.ln_f.bias", PERMUTATION])
def test_saving_that_changes_a_bit(good, monkeypatch, tensor):
    save = transformers.PreTrainedModel.save_pretrained

    def spoilt(self, folder, *rest, **options):
        save(self, folder, *rest, **options)
        with_tensors(folder, lambda tensors: tensors.update({tensor: tensors[tensor].flip(0)}))

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda self, f: spoilt(self, type(good)(f)))
    failure = only_failure(results_of(good))
    assert failure.name == "round-trip" and tensor in failure.detail


@pytest.mark.parametrize(
    ("status", "output", "errors", "words"),
    [
        (3, "", "Traceback\nOSError: no such file\n", "exit status 3: OSError: no such file"),
        (0, '{"class": "GPT2Model", "parameters": 1, "bytes": 1, "output": []}', "", "class: GPT2Model in a fresh"),
    ],
)
def test_a_fresh_process_that_fails(good, monkeypatch, status, output, errors, words):
    done = subprocess.CompletedProcess([], status, output, errors)
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: done)
    result = results_of(good, [CHECKS["fresh-process"]])["fresh-process"]
    assert result.status == "failed" and words in result.detail


def test_bounds_are_held(good):
    perplexity = [CHECKS["perplexity"]]
    ratio = results_of(good, perplexity, **quality())["perplexity"].figures["ratio"]
    for bound, status in ((ratio * 0.999, "failed"), (ratio * 1.001, "passed")):
        result = results_of(good, perplexity, **quality(max_perplexity_ratio=bound))["perplexity"]
        assert result.status == status and result.figures["ratio"] == pytest.approx(ratio)


def test_another_tokenizer_is_no_comparison(spoiled):
    save_tokenizer(spoiled)
    result = results_of(spoiled, [CHECKS["perplexity"]], **quality())["perplexity"]
    assert result.status == "failed" and "tokenizer" in result.detail


def test_a_teacher_that_does_not_load(good, tmp_path):
    teacher = copied(TINY, tmp_path / "teacher")
    with_tensors(teacher, without("transformer.ln_f.weight"))
    result = results_of(good, [CHECKS["perplexity"]], **quality(teacher=teacher))["perplexity"]
    assert result.status == "failed" and "the teacher" in result.detail and "ln_f.weight" in result.detail


@pytest.fixture
def family(tmp_path):
    """Saves a small random model of a family, and the same compressed to low rank where patterns are given."""

    def save(name, patterns=None, rank=24):
        model = family_model(name)
        folders = [tmp_path / kind for kind in ("dense", "compressed")]
        model.save_pretrained(folders[0])
        if patterns is not None:
            compress(model, TQConfig({pattern: LowRankSpec(rank) for pattern in patterns}, effort="fast"))
        model.save_pretrained(folders[1])
        for folder in folders:
            save_tokenizer(folder)
        return folders

    return save


@pytest.mark.parametrize("name", ["bert", "bert-tied", "distilbert"])
def test_encoders_are_held_by_their_embeddings(family, name):
    dense, compressed = family(name, ["*.query", "*q_lin"][name == "distilbert" :][:1])
    options = {"teacher": dense, "text": "one text\nand one more\n", "min_cosine": 0.8}
    results = results_of(compressed, **options)
    skipped = {name: "skipped" for name in ("native", "generation", "perplexity")}
    assert statuses(results) == {check.name: "passed" for check in QUICK} | skipped
    assert results["embeddings"].figures["texts"] == 2 and "got model_type" in results["native"].detail
    embeddings = [CHECKS["embeddings"]]
    assert results_of(compressed, embeddings, **options | {"min_cosine": 1.0})["embeddings"].status == "failed"
    for change in ({"teacher": None}, {"text": None}):
        result = results_of(compressed, embeddings, **options | change)["embeddings"]
        assert (result.status, result.detail) == ("skipped", f"needs a {next(iter(change))}")


@pytest.mark.parametrize("name", ["llama-tied", "opt-untied"])
def test_other_causal_models(family, name):
    dense, compressed = family(name, ["*.q_proj"])
    results = results_of(compressed, teacher=dense, text="one text, long enough to score", max_perplexity_ratio=9)
    skipped = {name: "skipped" for name in (*(["native"] if name == "opt-untied" else []), "embeddings")}
    assert statuses(results) == {check.name: "passed" for check in QUICK} | skipped


def test_a_dense_checkpoint():
    results = results_of(TINY, **quality())
    skipped = {name: "skipped" for name in ("permutations", "embeddings")}
    assert statuses(results) == {check.name: "passed" for check in QUICK} | skipped
    assert results["perplexity"].figures["ratio"] == 1.0 and "no report" in results["size"].detail


@pytest.mark.parametrize("options", [{}, {"budget": 0.5}], ids=["dense", "compressed"])
def test_eight_bit_weights(options, tmp_path):
    compress_checkpoint(TINY, tmp_path / "int8", dtype="int8", **options)
    results = results_of(tmp_path / "int8", [*SIZED, CHECKS["native"], CHECKS["round-trip"]])
    found = statuses(results)
    # A dense checkpoint has no permutations.
    assert (found.pop("permutations") == "passed") == bool(options) and set(found.values()) == {"passed"}
    assert "5,289,472 parameters" in results["size"].detail or options


def test_half_precision(good):
    only = [CHECKS[name] for name in ("native", "generation")]
    assert set(statuses(results_of(good, only, dtype="bfloat16")).values()) == {"passed"}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"source": "./nowhere"}, CheckpointError, "./nowhere: no such directory"),
        ({"source": TINY / "config.json"}, CheckpointError, "config.json: no such directory"),
        ({"teacher": TINY / "nowhere"}, CheckpointError, "nowhere: no such directory"),
        ({"max_perplexity_ratio": math.nan}, ConfigError, "max_perplexity_ratio: expected"),
        ({"max_perplexity_ratio": "1.1"}, ConfigError, "max_perplexity_ratio: expected"),
        ({"min_cosine": 1.5}, ConfigError, "min_cosine: expected a number from -1 to 1, got 1.5"),
        ({"dtype": "float64"}, ConfigError, "dtype: expected"),
        ({"text": " \n"}, TextError, "empty"),
        ({"text": TINY / "model.safetensors"}, TextError, "not UTF-8"),
    ],
)
def test_what_cannot_be_verified_is_an_error(changes, error, words):
    with pytest.raises(error, match=words.replace(".", r"\.")):
        verify_checkpoint(**{"source": TINY, **changes})
    assert not issubclass(error, DtypeError)
