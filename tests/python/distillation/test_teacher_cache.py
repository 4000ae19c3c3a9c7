"""Cached teachers against the dense softmax, within the documented error; errors, and interrupted runs."""

import errno
import math
import os
import pickle
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from helpers.processes import ENVIRONMENT
from helpers.teachers import TINY, check, dense, held_out_blocks, random_model
from tqcompressor import errors, token_blocks
from tqcompressor.distillation.teacher_cache import CachedTeacher, CachedTeacherDataset, cache_teacher


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def every_block(tmp_path_factory):
    return held_out_blocks(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def blocks(every_block):
    return every_block.section(3, 7)


@pytest.fixture(scope="module")
def cached(model, blocks, tmp_path_factory):
    return cache_teacher(model, blocks, tmp_path_factory.mktemp("teacher") / "teacher.safetensors", k=8)


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (8, 2.0), (64, 0.5), (300, 10.0), (8192, 2.0)])
def test_distributions_equal_the_dense_softmax(model, blocks, tmp_path, k, temperature):
    two = blocks.section(0, 2)
    cached = cache_teacher(model, two, tmp_path / "new" / "cache", k=k, temperature=temperature)
    assert (len(cached), cached.k, cached.temperature, cached.vocab_size) == (2, k, temperature, 8192)
    assert (cached.fingerprint, cached.seq_len) == (two.fingerprint, 16)
    assert cached.teacher.startswith("GPT2LMHeadModel") and str(model.num_parameters()) in cached.teacher.replace(
        ",", ""
    )
    for index in (0, 1, -1):
        check(cached[index], dense(model, two[index]["input_ids"], temperature), k)
    # 4 bytes for each of the k tokens, 4 for the tail, and the header.
    size = (tmp_path / "new" / "cache").stat().st_size
    assert 0 < size - two.tokens * (4 * k + 4) < 1000


def test_a_trained_teacher(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    trained = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    blocks = token_blocks(TINY / "heldout.txt", tokenizer, 128, tokens=3 * 128, cache=tmp_path)
    cached = cache_teacher(trained, blocks, tmp_path / "teacher")
    assert (cached.k, cached.temperature) == (64, 1.0)
    lost = [1 - cached[index]["teacher_probabilities"].double().sum(-1).mean() for index in range(3)]
    assert 0.2 < cached.mean_tail_mass() < 1 and cached.mean_tail_mass() == pytest.approx(np.mean(lost), rel=1e-4)
    for index in range(3):
        check(cached[index], dense(trained, blocks[index]["input_ids"], 1.0), 64)


def test_a_wide_vocabulary_is_four_bytes_wide(blocks, tmp_path):
    wide = random_model(vocab_size=70_000)
    one = blocks.section(0, 1)
    cached = cache_teacher(wide, one, tmp_path / "cache", k=4)
    check(cached[0], dense(wide, one[0]["input_ids"], 1.0), 4)
    assert int(cached[0]["teacher_tokens"].max()) >= 1 << 16
    assert 0 < (tmp_path / "cache").stat().st_size - one.tokens * (6 * 4 + 4) < 1000


def test_half_precision_teachers(model, blocks, tmp_path):
    half = random_model().to(torch.bfloat16)
    cached = cache_teacher(half, blocks.section(0, 1), tmp_path / "cache", k=4)
    check(cached[0], dense(half, blocks[0]["input_ids"], 1.0), 4)
    assert cached.weights != cache_teacher(model, blocks.section(0, 1), tmp_path / "other", k=4).weights


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_only_the_rounding(model, blocks, cached, tmp_path, batch_size):
    calls = []
    other = cache_teacher(
        model, blocks, tmp_path / "cache", k=8, batch_size=batch_size, progress=lambda *call: calls.append(call)
    )
    assert calls == [(min(end, 7), 7) for end in range(batch_size, 7 + batch_size, batch_size)]
    for index in range(7):
        assert other[index]["teacher_tokens"].equal(cached[index]["teacher_tokens"])
        torch.testing.assert_close(
            other[index]["teacher_probabilities"], cached[index]["teacher_probabilities"], rtol=1e-3, atol=1e-12
        )


def test_modes_are_restored_and_dropout_is_off(blocks, cached, tmp_path):
    training = random_model().train()
    training.transformer.h[1].eval()
    before = [module.training for module in training.modules()]
    again = cache_teacher(training, blocks, tmp_path / "cache", k=8)
    assert [module.training for module in training.modules()] == before
    assert again[3]["teacher_probabilities"].equal(cached[3]["teacher_probabilities"])
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in training.parameters())


def test_items_of_the_dataset_have_tokens_and_predictions(blocks, cached, every_block):
    dataset = CachedTeacherDataset(blocks, cached)
    assert len(dataset) == 7
    for index in (0, 4, -2):
        item, expected = dataset[index], blocks[index] | cached[index]
        assert set(item) == {"input_ids", "teacher_tokens", "teacher_probabilities"}
        assert all(item[name].equal(expected[name]) for name in item)
    part = dataset.section(2, 4).section(1, 2)
    assert len(part) == 2
    for index, same in ((0, 3), (1, 4), (-1, 4)):
        assert all(value.equal(dataset[same][name]) for name, value in part[index].items())
    with pytest.raises(IndexError):
        part[2]
    with pytest.raises(IndexError):
        cached[7]
    for others in (every_block, blocks.section(0, 6), every_block.section(4, 7)):
        with pytest.raises(errors.ConfigError) as caught:
            CachedTeacherDataset(others, cached)
        assert others.fingerprint in str(caught.value) and cached.fingerprint in str(caught.value)


def test_loaders_with_worker_processes(blocks, cached):
    dataset = CachedTeacherDataset(blocks, cached)
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=1, multiprocessing_context="fork")
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 3]
    assert batches[1]["teacher_probabilities"][2].equal(cached[6]["teacher_probabilities"])
    assert len(pickle.dumps(dataset)) < 2000


def test_a_teacher_of_equal_weights_is_not_run_again(blocks, cached, monkeypatch):
    again = random_model()
    monkeypatch.setattr(again, "forward", lambda **inputs: pytest.fail("the teacher was run"))
    assert cache_teacher(again, blocks, cached._path, k=8)[2]["teacher_tokens"].equal(cached[2]["teacher_tokens"])


def test_existing_files_are_not_overwritten(model, blocks, every_block, cached, tmp_path):
    before = cached._path.read_bytes()
    other = random_model()
    other.transformer.ln_f.bias.data[3] += 0.5
    for arguments, options, word in [
        ((other, blocks), {"k": 8}, "weights"),
        ((model, every_block.section(0, 7)), {"k": 8}, "fingerprint"),
        ((model, blocks), {"k": 9}, "another k: expected 9, got 8"),
        ((model, blocks), {"k": 8, "temperature": 2}, "another temperature: expected 2.0, got 1.0"),
    ]:
        with pytest.raises(errors.DestinationError, match=word):
            cache_teacher(*arguments, cached._path, **options)
    assert cached._path.read_bytes() == before
    (tmp_path / "diary").write_text("dear diary")
    with pytest.raises(errors.DestinationError, match="diary"):
        cache_teacher(model, blocks, tmp_path / "diary", k=8)
    assert (tmp_path / "diary").read_text() == "dear diary"


def test_open_checks_the_expected_settings(blocks, every_block, cached):
    assert len(CachedTeacher.open(cached._path, blocks=blocks, k=8, temperature=1)) == 7
    for expectation, words in [
        ({"blocks": every_block}, [every_block.fingerprint, blocks.fingerprint]),
        ({"k": 64}, ["k: expected 64, got 8"]),
        ({"temperature": 2.0}, ["temperature: expected 2.0, got 1.0"]),
    ]:
        with pytest.raises(errors.ConfigError) as caught:
            CachedTeacher.open(cached._path, **expectation)
        for word in [str(cached._path), *words]:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k: expected an integer from 1 to 8192, got 0"),
        ({"k": 8193}, "k: expected an integer from 1 to 8192, got 8193"),
        ({"temperature": 0}, "temperature: .*got 0"),
        ({"temperature": math.nan}, "temperature: .*got nan"),
        ({"batch_size": 0}, "batch_size: .*got 0"),
        ({"teacher": {"vocab_size": 8191}}, "8,191 tokens.* 8,192"),
        ({"teacher": {"n_positions": 15}}, "15 positions.* 16"),
    ],
)
def test_arguments_that_do_not_fit(model, blocks, tmp_path, options, words):
    teacher = random_model(**options.pop("teacher")) if "teacher" in options else model
    with pytest.raises(errors.ConfigError, match=words):
        cache_teacher(teacher, blocks, tmp_path / "cache", **{"k": 8, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_with_logits_that_are_not_finite(blocks, tmp_path, value):
    broken = random_model()
    broken.transformer.wte.weight.data[5, 3] = value
    with pytest.raises(errors.NonFiniteError, match=r"teacher's logits .*samples 0 to 1"):
        cache_teacher(broken, blocks, tmp_path / "cache", k=8, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def test_missing_space_is_found_before_the_teacher_runs(model, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda **inputs: pytest.fail("the teacher was run"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(errors.StorageError) as caught:
            cache_teacher(model, blocks, tmp_path / "cache", k=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_file_that_looks_complete(model, blocks, cached, tmp_path):
    script = """
        import os, pickle, sys
        from tqcompressor import cache_teacher

        model, blocks, path = pickle.loads(sys.stdin.buffer.read())
        cache_teacher(
            model, blocks, path, k=8, batch_size=2, progress=lambda done, total: done < 4 or os.kill(os.getpid(), 9)
        )
    """
    path = tmp_path / "cache"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=pickle.dumps((model, blocks, path)),
        capture_output=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=300,
    )
    assert run.returncode == -9, run.stderr.decode()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".cache.lock", ".cache.partial"]
    again = cache_teacher(model, blocks, path, k=8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == cached._path.read_bytes()
    assert again[6]["teacher_tokens"].equal(cached[6]["teacher_tokens"])
