"""Moments of a live model against a dense oracle, and the state of the model afterwards."""

import math

import numpy as np
import pytest
import torch
from helpers.measured import FAMILIES, batches, bert, gpt2, llama, opt, same, state
from helpers.models import CONFIG, tiny_model
from helpers.tokenizer import save_tokenizer
from tqcompressor import compress
from tqcompressor.calibration.calibrate import calibrate
from tqcompressor.calibration.units import units
from tqcompressor.errors import ConfigError, NonFiniteError


def oracle(model, data, seed=0, sensitivity=True):
    """The same moments in float64 numpy, from autograd's gradients at every module's output, batch by batch."""
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
    """OPT's positions: counted from the first token that is not padding, plus 2."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.cumsum(1) * mask - 1 + 2


def divergence(outputs, mask, generator):
    """The objective of the gradient, as documented."""
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
    many, few, one = (calibrate(model, data, samples=samples) for samples in (60, 10, 1))
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
    """The moments of the last layer without hooks: its output is replaced by hand and differentiated."""
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
    """The exact moment of the logits is `E[gᵀg] = diag(p) − ppᵀ`; here the diagonal for one token."""
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
    # The head also predicts tokens that do not occur in the text.
    assert found.input("wte").min() > 0
    assert found.output("wte").shape == (16, 16)
    assert [name for name in found.moments if name.startswith("output.")] == ["output.wte"]
    assert not any("lm_head" in name for name in found.moments)


def test_a_seed_gives_one_file(tmp_path):
    model, tokenizer = tiny_model(), save_tokenizer(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(model, tokenizer, "some letters, " * 30, num_samples=3, seq_len=8, seed=seed).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


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


def test_a_model_that_computes_nan_is_named():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="GPT2LMHeadModel returns NaN"):
        calibrate(model, batches())
    with pytest.raises(NonFiniteError, match=r"input\.h\.1\.mlp\.c_proj: the model computes NaN"):
        calibrate(model, batches(), sensitivity=False)


@pytest.mark.parametrize("cls", ["BertModel", "BertForSequenceClassification"])
def test_an_embedding_or_a_regression_of_nan_is_named(cls):
    # Their random gradients do not depend on the model's output.
    model = bert(cls, num_labels=1)
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"{cls} returns NaN"):
        calibrate(model, batches())


@pytest.mark.parametrize("sensitivity", [True, False])
@pytest.mark.parametrize(
    ("break_it", "first"),
    [
        (lambda h: h[1].mlp.c_fc.weight.fill_(torch.nan), r"the parameter transformer\.h\.1\.mlp\.c_fc\.weight"),
        (lambda h: h[0].ln_2.bias.fill_(torch.inf), r"the parameter transformer\.h\.0\.ln_2\.bias"),
        # Finite weights whose products are not.
        (lambda h: h[0].mlp.c_fc.weight.fill_(3e38), r"the output of transformer\.h\.0\.mlp\.c_fc"),
        (lambda h: h[1].attn.c_attn.weight.fill_(3e25), r"the input of transformer\.h\.1\.attn\.c_proj"),
    ],
)
def test_the_first_layer_with_nan_is_named(break_it, first, sensitivity):
    model = gpt2()
    with torch.no_grad():
        break_it(model.transformer.h)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(NonFiniteError, match=rf"{first} is the first to have it \(.*float32 already"):
        calibrate(model, batches(), sensitivity=sensitivity)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_float32_is_what_may_help(dtype):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(6e4 if dtype == torch.float16 else 3e38)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NonFiniteError, match=rf"h\.0\.mlp\.c_fc is the first.*in {name}, and float32 may help"):
        calibrate(model.to(dtype), batches())


def decoding(name):
    from helpers.composites import composite, two_sides

    sides = two_sides()
    labels = sides.pop("decoder_input_ids")
    return composite(name), sides["input_ids"], labels


@pytest.mark.parametrize("name", ["t5", "pegasus", "two-berts"])
def test_an_encoder_decoder_reads_its_labels(name):
    from helpers.families import LOW_RANK
    from tqcompressor.compression.model import compress
    from tqcompressor.config import TQConfig

    model, ids, labels = decoding(name)
    found = calibrate(model, [{"input_ids": ids, "labels": labels}])
    if name == "t5":
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        assert same(found, calibrate(model, [{"input_ids": ids, "decoder_input_ids": shifted}]))
        # One sequence, and both inputs at once.
        calibrate(model, [{"input_ids": ids[0], "labels": labels[0]}], sensitivity=False)
        calibrate(model, [{"input_ids": ids, "labels": labels, "decoder_input_ids": shifted}], sensitivity=False)
    matrix = next(key.removeprefix("output.") for key in found.moments if key.startswith("output.decoder."))
    report = compress(model, TQConfig({matrix: LOW_RANK}, effort="fast"), calibration=found, progress=False)
    assert report.calibrated


@pytest.mark.parametrize("name", ["t5", "two-berts", "prophetnet"])
@pytest.mark.parametrize("sensitivity", [True, False])
def test_nothing_to_decode_is_named(name, sensitivity):
    model, ids, _ = decoding(name)
    with pytest.raises(ConfigError, match=r'is an encoder-decoder: expected batches with "labels".*got input_ids'):
        calibrate(model, [ids], sensitivity=sensitivity)
