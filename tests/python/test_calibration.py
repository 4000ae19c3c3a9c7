"""Second moments against dense numpy oracles, on small models of four families; their file; and what goes wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import encode, read_safetensors, write_safetensors
from helpers.models import CONFIG, tiny_model
from helpers.tokenizer import save_tokenizer
from tokenizers import processors
from tqcompressor import Calibration, compress, token_blocks
from tqcompressor.errors import (
    CheckpointError,
    ConfigError,
    MomentError,
    NonFiniteError,
    ShapeError,
    StorageError,
    TextError,
)
from tqcompressor.moment_batches import batches_of
from tqcompressor.moment_hooks import calibrate
from tqcompressor.moment_sums import units

TINY = Path(__file__).parents[1] / "data" / "tiny-gpt2"
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL |= {"max_position_embeddings": 24, "initializer_range": 0.3}


def gpt2(cls="GPT2LMHeadModel", **changes):
    return tiny_model(cls, n_embd=16, n_head=2, vocab_size=60, n_positions=24, **changes)


def bert(cls="BertModel", **changes):
    config = transformers.BertConfig(**SMALL | {"intermediate_size": 32, "pad_token_id": 0} | changes)
    return built(cls, config)


def opt(**changes):
    config = transformers.OPTConfig(**SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16} | changes)
    return built("OPTForCausalLM", config)


def llama(**changes):
    config = transformers.LlamaConfig(**SMALL | {"intermediate_size": 32, "num_key_value_heads": 1} | changes)
    return built("LlamaForCausalLM", config)


def built(cls, config):
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).eval()


FAMILIES = {
    "gpt2": gpt2,
    "gpt2 base": lambda: gpt2("GPT2Model"),
    "bert": bert,
    "bert masked": lambda: bert("BertForMaskedLM"),
    "bert classes": lambda: bert("BertForSequenceClassification", num_labels=3),
    "opt": opt,
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
}


def batches(padded=True, seed=0):
    """Two batches of 3 rows of 9 tokens, some of them padding on the right."""
    random = np.random.default_rng(seed)
    found = []
    for lengths in ((9, 5, 7), (2, 9, 9)):
        ids = torch.tensor(random.integers(3, 60, (3, 9)))
        mask = torch.tensor([[int(position < length) for position in range(9)] for length in lengths])
        found.append({"input_ids": ids * mask, "attention_mask": mask} if padded else {"input_ids": ids})
    return found


def oracle(model, data, seed=0, sensitivity=True):
    """The same moments by float64 numpy from what autograd says of every module's output, one batch at a time."""
    everything = {unit.name: unit for unit in units(model)}
    sums = {}
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    for batch in data:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        tokens += int(mask.sum())
        seen = []

        def hook(name, seen=seen):
            def keep(_module, args, kwargs, y):
                y.requires_grad_() if y.is_leaf else y.retain_grad()
                x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
                seen.append((name, x, y))

            return keep

        handles = [unit.module.register_forward_hook(hook(unit.name), with_kwargs=True) for unit in everything.values()]
        outputs = model(**batch)
        divergence(outputs, mask, generator).backward()
        for handle in handles:
            handle.remove()
        for name, x, output in seen:
            shape = tuple(output.shape[:-1])
            if shape in (tuple(mask.shape), (mask.numel(),)):
                kept = mask.reshape(-1).numpy()
            elif shape == (1, mask.shape[1]):
                kept = mask.sum(0).numpy()
            else:
                kept = np.ones(int(np.prod(shape)), int)
            unit = everything[name]
            if unit.embedding:
                ids = position_ids(batch) if "position" in name and "opt" in type(model).__name__.lower() else x
                product = np.bincount(ids.reshape(-1).numpy(), kept, unit.inputs).astype(np.float64)
            else:
                rows = x.detach().double().numpy().reshape(-1, unit.inputs)[kept > 0]
                product = rows.T @ rows
            total = sums.setdefault(name, [0, 0, 0])
            total[0] = total[0] + product
            if output.grad is not None:
                g = output.grad.double().numpy().reshape(len(kept), -1)[kept > 0]
                total[1] = total[1] + g.T @ g
                total[2] += kept.sum()
    found = {}
    for name, (inputs, gradients, rows) in sums.items():
        found[f"input.{name}"] = inputs / tokens
        if rows:
            first = 0
            for part, count in everything[name].outputs:
                found[f"output.{part}"] = gradients[first : first + count, first : first + count] / rows
                first += count
    return found


def position_ids(batch):
    """OPT's: counted from the first token that is no padding, two rows further down."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.cumsum(1) * mask - 1 + 2


def divergence(outputs, mask, generator):
    """What the gradient is taken of, written down as it is documented."""
    if "logits" not in outputs:
        hidden = outputs.last_hidden_state * mask[..., None]
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        embedding = pooled / pooled.norm(dim=1, keepdim=True)
        return (embedding * torch.randn(embedding.shape, generator=generator)).sum()
    logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    levels = torch.rand((len(logits), 1), generator=generator)
    labels = [
        int(np.searchsorted(np.cumsum(row), level * row.sum(), side="right"))
        for row, level in zip(logits.detach().double().softmax(-1).numpy(), levels[:, 0].tolist(), strict=True)
    ]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    return (each * mask.reshape(-1)).sum() if len(each) == mask.numel() else each.sum()


def merged(moments, embedding, head):
    """The documented moment of a tied embedding and head."""
    d1, c1 = moments[f"input.{embedding}"], moments[f"output.{embedding}"]
    c2, d2 = moments.pop(f"input.{head}"), moments.pop(f"output.{head}").diagonal()
    total = d1.sum() * np.trace(c1) + d2.sum() * np.trace(c2)
    moments[f"input.{embedding}"] = (d1 * np.trace(c1) + d2 * np.trace(c2)) / total
    moments[f"output.{embedding}"] = d1.sum() * c1 + d2.sum() * c2
    assert np.trace(np.diag(moments[f"input.{embedding}"])) * np.trace(moments[f"output.{embedding}"]) == pytest.approx(
        total
    )


def test_more_samples_come_nearer_to_the_expected_moment():
    model, data = FAMILIES["bert"](), batches(False)
    many, few, one = (calibrate(model, data, samples=samples) for samples in (200, 20, 1))
    for name, moment in many.moments.items():
        if name.startswith("input."):
            np.testing.assert_array_equal(one.moments[name], moment)
        elif np.any(moment):
            distances = [np.linalg.norm(other.moments[name] - moment) for other in (few, one)]
            assert distances[0] < distances[1], name
    with pytest.raises(ConfigError, match="samples"):
        calibrate(model, data, samples=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_dense_oracle(family, padded):
    model, data = FAMILIES[family](), batches(padded)
    expected = oracle(model, data)
    for unit in units(model):
        if unit.tied_to is not None:
            merged(expected, unit.tied_to, unit.name)
    model = FAMILIES[family]()
    found = calibrate(model, data, sensitivity=True, samples=1)
    assert set(found.moments) == set(expected)
    assert len(expected) >= 15
    for name, moment in found.moments.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(moment, expected[name], rtol=0, atol=2e-5 * scale + 1e-30, err_msg=name)
    alone = calibrate(model, data, sensitivity=False)
    for name in alone.moments:
        if name.startswith("input.") and f"output.{name.removeprefix('input.')}" not in alone.moments:
            np.testing.assert_array_equal(alone.moments[name], found.moments[name])


def test_one_gradient_is_autograd_by_hand():
    """The whole chain for the last layer, without hooks: its output put in place by hand, and differentiated."""
    model, data = gpt2(tie_word_embeddings=False), batches(padded=False)[:1]
    found = calibrate(model, data, seed=5)
    layer, kept = model.transformer.h[1].mlp.c_proj, {}

    def replaced(x):
        kept["x"] = x.detach()
        kept["y"] = (x @ layer.weight + layer.bias).detach().requires_grad_()
        return kept["y"]

    layer.forward = replaced
    outputs = model(**data[0])
    divergence(outputs, torch.ones(3, 9), torch.Generator().manual_seed(5)).backward()
    x, g = (rows.double().reshape(27, -1).numpy() for rows in (kept["x"], kept["y"].grad))
    np.testing.assert_allclose(found.input("h.1.mlp.c_proj"), x.T @ x / 27, atol=1e-5 * np.abs(x).max() ** 2)
    np.testing.assert_allclose(found.output("h.1.mlp.c_proj"), g.T @ g / 27, atol=1e-5 * np.abs(g).max() ** 2)


def test_the_fisher_information_is_what_labels_drawn_often_enough_average_to():
    """For the logits themselves it is known: `E[gᵀg] = diag(p) − ppᵀ`, here for one token and its diagonal."""
    model = gpt2(tie_word_embeddings=False)
    data = [torch.full((400, 1), 7) for _ in range(10)]
    with torch.no_grad():
        p = model(data[0][:1]).logits[0, 0].double().softmax(-1)
    moment = calibrate(model, data).output("lm_head")
    expected = (torch.diag(p) - p[:, None] * p).numpy()
    assert np.abs(moment - expected).max() < 5 / math.sqrt(4000) * expected.max()


def test_what_padding_holds_changes_nothing():
    model, data = bert(), batches()
    other = [batch | {"input_ids": batch["input_ids"] + 11 * (1 - batch["attention_mask"])} for batch in data]
    assert same(calibrate(model, data), calibrate(model, other))
    assert calibrate(model, data).tokens == 41


def test_shared_inputs_are_measured_for_each_layer():
    found = calibrate(llama(), batches(), sensitivity=False)
    names = [f"layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert all(np.array_equal(found.input(names[0]), found.input(name)) for name in names)
    assert not np.array_equal(found.input(names[0]), found.input("layers.0.mlp.up_proj"))


def test_embeddings_have_frequencies():
    found = calibrate(opt(tie_word_embeddings=False), batches(), sensitivity=False)
    data = batches()
    counts = np.zeros(60)
    for batch in data:
        counts += np.bincount(batch["input_ids"][batch["attention_mask"] > 0], minlength=60)
    np.testing.assert_allclose(found.input("decoder.embed_tokens"), counts / 41, rtol=1e-6)
    positions = found.input("decoder.embed_positions")
    assert positions[2] == pytest.approx(6 / 41) and positions[:2].sum() == 0 and positions.sum() == pytest.approx(1)


def test_a_tied_head_counts_without_gradients_too():
    found = calibrate(gpt2(), batches(), sensitivity=False)
    # Tokens that the text lacks are still predicted.
    assert found.input("wte").min() > 0
    assert found.output("wte").shape == (16, 16)
    assert [name for name in found.moments if name.startswith("output.")] == ["output.wte"]
    assert not any("lm_head" in name for name in found.moments)


def same(one, other):
    return one.moments.keys() == other.moments.keys() and all(
        np.array_equal(one.moments[name], other.moments[name]) for name in one.moments
    )


def test_a_seed_gives_one_file(tmp_path):
    model, tokenizer = tiny_model(), save_tokenizer(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(model, tokenizer, "some letters, " * 30, blocks=3, block_length=8, seed=seed).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def tiny_gpt2():
    return (
        transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(TINY),
    )


@pytest.mark.parametrize("sensitivity", [False, True])
def test_little_memory_takes_more_passes_and_gives_the_same(sensitivity):
    model, data = gpt2(), batches()
    largest = max(unit.bytes(sensitivity) for unit in units(model))
    done = {}
    found = {}
    for room in (1 << 30, largest):
        calls = done[room] = []
        found[room] = calibrate(
            model,
            data,
            sensitivity=sensitivity,
            max_memory=room,
            progress=lambda *state, calls=calls: calls.append(state),
        )
    assert done[1 << 30] == [(1, 2), (2, 2)]
    assert len(done[largest]) >= 8 and done[largest][-1] == (len(done[largest]),) * 2
    assert same(*found.values())
    with pytest.raises(ConfigError, match=rf"max_memory: expected at least {largest:,} bytes, for h\.0"):
        calibrate(model, data, sensitivity=sensitivity, max_memory=largest - 1)


def test_a_generator_of_batches_will_do():
    assert same(calibrate(gpt2(), iter(batches()), max_memory=1 << 16), calibrate(gpt2(), batches()))


def test_a_compressed_model_is_measured_like_the_dense_one_that_it_stands_for():
    model = tiny_model()
    data = batches()
    compress(model, CONFIG)
    found = calibrate(model, data)
    dense = calibrate(model.dequantize(), data)
    assert found.moments.keys() == dense.moments.keys()
    for name, moment in dense.moments.items():
        np.testing.assert_allclose(found.moments[name], moment, atol=1e-4 * np.abs(moment).max(), err_msg=name)


def test_half_precision_is_close_to_single():
    model = gpt2("GPT2Model")
    single = calibrate(model, batches())
    half = calibrate(model.half(), batches())
    for name, moment in single.moments.items():
        assert np.linalg.norm(half.moments[name] - moment) < 0.02 * np.linalg.norm(moment), name


def state(model):
    return {
        "training": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "weights": [parameter.clone() for parameter in model.parameters()],
    }


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("sensitivity", [False, True])
def test_the_model_comes_back_as_it_was(sensitivity, error):
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    model.transformer.h[1].requires_grad_(False)
    model.transformer.wpe.weight.grad = torch.ones_like(model.transformer.wpe.weight)
    before, random = state(model), torch.random.get_rng_state()

    def progress(done, total):
        if done == 2 and error is not None:
            raise error

    if error is None:
        calibrate(model, batches(), sensitivity=sensitivity, progress=progress)
    else:
        with pytest.raises(error):
            calibrate(model, batches(), sensitivity=sensitivity, progress=progress)
    after = state(model)
    assert after["training"] == before["training"] and after["required"] == before["required"]
    assert after["hooks"] == before["hooks"] == 0
    for key in ("gradients", "weights"):
        assert all(
            (one is None and other is None) or torch.equal(one, other)
            for one, other in zip(before[key], after[key], strict=True)
        )
    assert torch.equal(random, torch.random.get_rng_state())


def test_no_grad_around_it_makes_no_difference():
    model = gpt2()
    with torch.no_grad():
        assert same(calibrate(model, batches()), calibrate(model, batches()))
    assert calibrate(model, batches()).output("h.0.mlp.c_fc") is not None


def test_blocks_of_a_text_are_drawn_by_the_seed(tmp_path):
    model, tokenizer = tiny_gpt2()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    whole = token_blocks(tmp_path / "text.txt", tokenizer, 8, cache=tmp_path)
    rows = {tuple(whole[index]["input_ids"].tolist()) for index in range(len(whole))}

    def drawn(source, text=None, **options):
        found = batches_of(model, source, text, **{"blocks": 20, "block_length": 8, "seed": 1} | options)
        return [tuple(row.tolist()) for batch in found for row in batch["input_ids"]]

    one = drawn(tokenizer, text)
    assert len(set(one)) == 20 and set(one) <= rows
    assert one == drawn(tokenizer, [text]) == drawn(tokenizer, tmp_path / "text.txt") == drawn(whole)
    assert one != drawn(tokenizer, text, seed=2)
    assert len(set(drawn(whole, blocks=len(whole)))) == len(rows)
    (longest,) = {len(row) for row in drawn(tokenizer, text, blocks=2, block_length=None)}
    assert longest == 128


def test_blocks_have_the_special_tokens_of_an_input(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <|endoftext|>", special_tokens=[("<unk>", 1), ("<|endoftext|>", 0)]
    )
    model = tiny_model()
    (batch,) = batches_of(model, tokenizer, "letters " * 40, blocks=3, block_length=7, seed=0)
    ids = batch["input_ids"]
    assert ids.shape == (3, 7) and ids[:, 0].tolist() == [1] * 3 and ids[:, -1].tolist() == [0] * 3
    assert ids[:, 1:-1].min() > 1
    with pytest.raises(ConfigError, match="block_length: expected 4 to 32"):
        calibrate(model, tokenizer, "letters " * 40, block_length=3)


def test_errors_of_the_text(tmp_path):
    model, tokenizer = tiny_gpt2()
    for text, options, error, message in (
        ("short", {}, TextError, r"expected 128 blocks of 128 tokens, got a text of \d+ tokens: 0"),
        ("", {}, TextError, "expected 128 blocks"),
        (None, {}, ConfigError, "text: a tokenizer needs a text"),
        ("a" * 999, {"blocks": 0}, ConfigError, "blocks: expected at least 1, got 0"),
        ("a" * 999, {"block_length": 1}, ConfigError, "block_length: expected 2 to 128"),
        ("a" * 999, {"block_length": 129}, ConfigError, "block_length: expected 2 to 128"),
    ):
        with pytest.raises(error, match=message):
            calibrate(model, tokenizer, text, **options)
    with pytest.raises(ConfigError, match="the model knows 60 tokens, the text has token"):
        calibrate(
            gpt2(), tokenizer, (TINY / "heldout.txt").read_text(encoding="utf-8")[:5000], blocks=2, block_length=8
        )


def test_errors_of_batches():
    ids = torch.ones(2, 5, dtype=torch.long)
    for source, error, message in (
        ([], TextError, "there are no batches"),
        (3, ConfigError, "expected a tokenizer, TokenBlocks or batches, got int"),
        ("text", ConfigError, "got str"),
        ([ids, {"attention_mask": ids}], ConfigError, 'batch 1: expected a tensor "input_ids"'),
        ([ids.float()], ConfigError, "batch 0: expected input_ids .* of integers"),
        ([ids[:, :0]], ConfigError, "batch 0: expected input_ids"),
        ([ids, ids * 60], ConfigError, "batch 1: expected tokens below 60, got 60"),
        ([{"input_ids": ids, "attention_mask": ids[:, :3]}], ConfigError, r"expected an attention_mask \(2, 5\)"),
        ([{"input_ids": ids, "attention_mask": 0 * ids}], TextError, "no token that is not padding"),
    ):
        with pytest.raises(error, match=message):
            calibrate(gpt2(), source)


def test_a_model_that_computes_nan_is_named():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="GPT2LMHeadModel returns NaN"):
        calibrate(model, batches())
    with pytest.raises(NonFiniteError, match=r"input\.h\.1\.mlp\.c_proj: the model computes NaN"):
        calibrate(model, batches(), sensitivity=False)


def some_moments():
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 6)).astype(np.float32)
    return {"input.h.0.attn.c_attn": x.T @ x, "output.h.0.attn.c_attn.q": np.arange(4.0), "input.wte": np.ones(9)}


def test_a_file_holds_what_was_saved(tmp_path):
    saved = Calibration(some_moments(), 30, 7, True, "gpt2")
    saved.save(tmp_path / "new" / "file")
    loaded = Calibration.load(tmp_path / "new" / "file")
    assert same(saved, loaded)
    assert (loaded.tokens, loaded.seed, loaded.sensitivity, loaded.model_type) == (30, 7, True, "gpt2")
    assert np.array_equal(loaded.input("h.0.attn.c_attn.q"), saved.input("h.0.attn.c_attn"))
    assert loaded.input("h.0.mlp.c_fc.q") is None and loaded.output("wte") is None
    # Anybody's reader of safetensors.
    stored = read_safetensors(tmp_path / "new" / "file")
    assert {name: tuple(shape) for name, (_, shape, _) in stored.items()} == {
        name: moment.shape for name, moment in saved.moments.items()
    }
    loaded.check("h.0.attn.c_attn.q", 6, 4)
    with pytest.raises(ShapeError, match=r"input\.h\.0\.attn\.c_attn\.q: expected the moment of 8 inputs.* of 6"):
        loaded.check("h.0.attn.c_attn.q", 8, 4)
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize(
    ("name", "moment", "error", "message"),
    [
        ("input.a", np.ones((2, 3)), ShapeError, r"input\.a: expected a square matrix or its diagonal, got .*\(2, 3\)"),
        ("input.a", np.ones((0,)), ShapeError, r"input\.a"),
        ("input.a", np.ones((1, 1, 1)), ShapeError, r"input\.a"),
        ("input.a", np.array([1.0, np.nan]), NonFiniteError, r"input\.a: holds NaN"),
        ("input.a", np.diag([1.0, 1e300]), NonFiniteError, r"input\.a"),
        ("output.a", np.array([1.0, -1.0]), MomentError, r"output\.a: expected a diagonal .* got -1"),
        ("output.a", np.array([[1.0, 2.0], [0.0, 1.0]]), MomentError, r"output\.a: .* symmetric .* 0 at \(1, 0\)"),
        ("a", np.ones(2), MomentError, 'begins with "input."'),
    ],
)
def test_moments_that_are_none_are_refused(tmp_path, name, moment, error, message):
    with pytest.raises(error, match=message):
        Calibration({name: moment}, 1)
    with np.errstate(over="ignore"):
        stored = encode(moment)
    metadata = {"format_version": "1", "tokens": "1", "seed": "0", "sensitivity": "true"}
    write_safetensors(tmp_path / "file", {name: stored})
    write_header(tmp_path / "file", lambda header: header | {"__metadata__": metadata})
    with pytest.raises(error, match=f"file: .*{message}"):
        Calibration.load(tmp_path / "file")


def test_no_tokens_are_refused():
    with pytest.raises(MomentError, match="tokens: expected at least 1, got 0"):
        Calibration({}, 0)


def write_header(path, change):
    """Changes the header of a file and nothing behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8:end]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def entry(**changes):
    return lambda header: header | {"input.wte": header["input.wte"] | changes}


def metadata(**changes):
    return lambda header: header | {"__metadata__": header["__metadata__"] | changes}


HOSTILE = {
    "no metadata": lambda header: {name: part for name, part in header.items() if name != "__metadata__"},
    "a list": lambda header: [header],
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe",
    "deep": lambda _: b"[" * 100_000,
    "newer": metadata(format_version="2"),
    "no number": metadata(tokens="many"),
    "no truth": metadata(sensitivity="perhaps"),
    "half precision": entry(dtype="F16"),
    "a wider shape": entry(shape=[10]),
    "a negative shape": entry(shape=[-9]),
    "a huge shape": entry(shape=[1 << 40, 1 << 40]),
    "no shape": entry(shape=None),
    "words for a shape": entry(shape=["9"]),
    "offsets beyond the end": entry(data_offsets=[1 << 40, (1 << 40) + 36]),
    "offsets over another": entry(data_offsets=[0, 36]),
    "offsets backwards": entry(data_offsets=[36, 0]),
    "one offset": entry(data_offsets=[0]),
    "no entry": lambda header: header | {"input.more": 3},
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, lie):
    path = tmp_path / "file"
    Calibration(some_moments(), 30).save(path)
    write_header(path, HOSTILE[lie])
    with pytest.raises(CheckpointError, match="file: "):
        Calibration.load(path)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "file"
    Calibration(some_moments(), 30).save(path)
    content = path.read_bytes()
    for length in (0, 5, 8, 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="file: "):
            Calibration.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        Calibration.load(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Calibration.load(path)
    with pytest.raises(StorageError):
        Calibration.load(tmp_path / "absent")


def test_a_full_disk_leaves_the_old_file(tmp_path, tmpfs):
    path = tmpfs("size=16k") / "file"
    Calibration(some_moments(), 30).save(path)
    before = path.read_bytes()
    with pytest.raises(StorageError):
        Calibration({"input.a": np.eye(100)}, 1).save(path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
