"""Refining: blocks get closer to the dense model's, nothing else changes, and what fails leaves no trace."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers
from helpers.measured import FAMILIES, batches, bert, built, gpt2, llama, opt, state
from helpers.models import agree, first_output, some_ids, tiny_model
from helpers.snapshots import assert_untouched, snapshot
from helpers.tokenizer import save_tokenizer
from tqcompressor import KroneckerSpec, LowRankSpec, TQConfig, calibrate, compress, token_blocks
from tqcompressor.calibration.batches import batches_of
from tqcompressor.compression import model as in_place
from tqcompressor.compression import refine as refining
from tqcompressor.errors import ConfigError, NonFiniteError, TextError
from tqcompressor.losses import kl_divergence
from tqcompressor.models.blocks import transformer_blocks
from tqcompressor.models.matrices import compressed_modules


def some_batches():
    return [batch for seed in range(12) for batch in batches(padded=False, seed=seed)]


def divergence(model, student, of):
    """The mean Kullback-Leibler divergence of the predictions of the next token from the original ones."""
    with torch.no_grad():
        found = [kl_divergence(student(**each).logits.float(), model(**each).logits.float()) for each in of]
    return float(torch.stack(found).mean())


def lost(model, student, of):
    """What refining makes smaller behind the last block."""
    return (divergence if predicts_tokens(model) else block_error)(model, student, of)


def predicts_tokens(model):
    return "LM" in type(model).__name__


def block_error(model, student, of):
    """The squared distance of the last block's outputs, as a share of the squares of the original ones."""
    found = []
    for each in (model, student):
        *_, last = transformer_blocks(each).values()
        outputs = []
        handle = last.register_forward_hook(
            lambda _module, _arguments, output, outputs=outputs: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        with torch.no_grad():
            for batch in of:
                each(**batch)
        handle.remove()
        found.append(torch.cat(outputs).float())
    return float(((found[0] - found[1]) ** 2).sum() / (found[0] ** 2).sum())


@pytest.fixture
def fast_learning(monkeypatch):
    # Few steps must do.
    monkeypatch.setattr(refining, "_LEARNING_RATES", (2e-3,))


@pytest.mark.parametrize(
    ("family", "calibrated"), [*((family, True) for family in FAMILIES), ("gpt2", False), ("bert", False)]
)
def test_the_outputs_come_closer(family, calibrated, fast_learning):
    model, read = FAMILIES[family](), some_batches()
    options = {"budget": 0.8, "calibration": calibrate(model, read)} if calibrated else {"budget": 0.8}
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, **options)
    report = compress(refined, **options, refine=read, refine_epochs=4)
    assert report.parameters_after == refined.num_parameters() == plain.num_parameters()
    before, after = (lost(model, student, read) for student in (plain, refined))
    assert 0 < after < before


@pytest.mark.parametrize("spec", [KroneckerSpec((2, 2), 2), KroneckerSpec((2, 2), 2, "columns"), LowRankSpec(3)])
def test_every_kind_of_factors_learns(spec, fast_learning):
    model, read = llama(), some_batches()
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    config = TQConfig({"layers.*": spec}, effort="fast")
    compress(plain, config)
    compress(refined, config, refine=read, refine_epochs=4)
    assert lost(model, refined, read) < 0.95 * lost(model, plain, read)


@pytest.mark.parametrize("family", [gpt2, bert, opt, llama])
def test_nothing_but_factors_and_vectors_of_blocks_changes(family, fast_learning):
    model, read = family(), some_batches()
    model.train()
    next(model.parameters()).requires_grad_(False)
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, budget=0.7)
    compress(refined, budget=0.7, refine=read)
    for name in ("training", "required", "hooks"):
        assert state(plain)[name] == state(refined)[name], name
    assert all(parameter.grad is None for parameter in refined.parameters())
    blocks = tuple(transformer_blocks(model))
    factors = [name for name, _ in compressed_modules(refined) if name.startswith(blocks)]
    changed = []
    for name, value in refined.state_dict().items():
        if not torch.equal(value, plain.state_dict()[name]):
            changed.append(name)
            assert name.startswith(blocks), name
            assert value.ndim == 1 or name.startswith(tuple(factors)), name
            assert not name.endswith("permutation"), name
    assert len(changed) >= len(factors)
    assert any("norm" in name or "ln_" in name or "LayerNorm" in name for name in changed)
    assert plain.config.to_dict() == refined.config.to_dict()


def test_a_vector_that_is_shared_stays(fast_learning):
    model, read = llama(), some_batches()
    first, second = model.model.layers[:2]
    second.input_layernorm.weight = first.input_layernorm.weight
    model.model.norm.weight = first.post_attention_layernorm.weight
    before = {name: value.clone() for name, value in model.named_parameters() if "norm" in name}
    compress(model, TQConfig({"layers.*": LowRankSpec(3)}, effort="fast"), refine=read)
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"model.layers.1.post_attention_layernorm.weight"}
    assert second.input_layernorm.weight is first.input_layernorm.weight


def test_gradients_of_the_caller_stay():
    model, read = llama(), some_batches()
    model(**read[0], labels=read[0]["input_ids"]).loss.backward()
    kept = {name: value.grad.clone() for name, value in model.named_parameters() if "norm" in name}
    compress(model, TQConfig({"layers.*": KroneckerSpec((2, 2), 2)}, effort="fast"), refine=read, refine_epochs=1)
    for name, value in model.named_parameters():
        assert torch.equal(value.grad, kept[name]) if name in kept else value.grad is None or "layers" not in name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", [gpt2, bert, opt, llama])
def test_the_dtype_stays(family, dtype, fast_learning):
    model, read = family().to(dtype), some_batches()
    calibration = calibrate(model, read)
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, budget=0.6, calibration=calibration)
    compress(refined, budget=0.6, calibration=calibration, refine=read, refine_epochs=4)
    assert {value.dtype for value in refined.parameters()} == {dtype}
    assert lost(model, refined, read) < 0.95 * lost(model, plain, read)


def test_equal_seeds_give_equal_factors_and_the_result_is_loaded(tmp_path):
    model, read = gpt2(), some_batches()
    calibration, stored = calibrate(model, read), {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        student = copy.deepcopy(model)
        compress(student, budget=0.7, calibration=calibration, refine=iter(read), seed=seed)
        student.save_pretrained(tmp_path / name)
        stored[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert stored["one"] == stored["same"] != stored["other"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    ids = some_ids() % 60
    assert agree(first_output(loaded, ids), first_output(student, ids))


def test_a_block_that_gets_worse_is_put_back(monkeypatch):
    model, read = gpt2(), some_batches()
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, budget=0.7)
    monkeypatch.setattr(refining, "_LEARNING_RATES", (1e4, 1e3))
    compress(refined, budget=0.7, refine=read)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in refined.state_dict().items())


def test_a_smaller_rate_is_tried_where_a_larger_one_is_too_large(monkeypatch):
    model, read = llama(), some_batches()
    rates = {}
    for name, chosen in (("small", (2e-3,)), ("large first", (1e4, 2e-3))):
        student = copy.deepcopy(model)
        monkeypatch.setattr(refining, "_LEARNING_RATES", chosen)
        compress(student, budget=0.6, refine=read)
        rates[name] = student.state_dict()
    assert all(torch.equal(value, rates["large first"][name]) for name, value in rates["small"].items())


@pytest.mark.parametrize("step", [1, 5, 20])
def test_interrupted_in_the_middle_the_model_is_as_it_was(step, monkeypatch):
    model, read = gpt2(), some_batches()
    model.train()
    before, steps, real = snapshot(model), [], torch.optim.AdamW.step

    def interrupt(*arguments, **options):
        steps.append(None)
        if len(steps) == step:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(model, budget=0.7, refine=read)
    assert len(steps) == step
    assert_untouched(model, before)
    assert state(model)["hooks"] == 0 and all(parameter.requires_grad for parameter in model.parameters())


def test_the_progress_callback_sees_the_blocks_and_may_interrupt():
    model, read, seen = gpt2(), some_batches(), []
    compress(copy.deepcopy(model), budget=0.7, refine=read, progress=lambda *counts: seen.append(counts))
    assert seen[-2:] == [(1, 2), (2, 2)]
    before = snapshot(model)

    def interrupt(done, total):
        if (done, total) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, budget=0.7, refine=read, progress=interrupt)
    assert_untouched(model, before)


def test_texts_are_those_that_calibrate_takes(tmp_path):
    model, tokenizer = tiny_model(), save_tokenizer(tmp_path)
    text = "the letters of a text, one by one, and then some. " * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    drawn = batches_of(model, tokenizer, text, num_samples=16, seq_len=None, seed=5)
    config = TQConfig({"h.*.mlp.c_proj": LowRankSpec(8)}, effort="fast", seed=5)
    blocks = token_blocks(tmp_path / "text.txt", tokenizer, 32, cache=tmp_path, progress=False)
    factors = []
    for texts in (drawn, (tokenizer, text), (tokenizer, tmp_path / "text.txt"), blocks):
        student = copy.deepcopy(model)
        compress(student, config, refine=texts, refine_epochs=1, num_samples=16, seed=5)
        factors.append(student.transformer.h[1].mlp.c_proj.left)
    assert all(torch.equal(factors[0], other) for other in factors)
    calibrated = copy.deepcopy(model)
    reading = {"text": text, "tokenizer": tokenizer, "num_samples": 16}
    report = compress(calibrated, config, **reading, refine=True, refine_epochs=1)
    assert report.calibration is not None
    with pytest.raises(TextError, match="expected 128 sequences"):
        compress(model, config, refine=(tokenizer, text[:1000]))


def test_a_token_of_huge_size_does_not_hide_the_others(fast_learning):
    model = llama(num_hidden_layers=3).model
    read = [{"input_ids": torch.cat([torch.full((3, 1), 2), each["input_ids"]], 1)} for each in some_batches()]
    make_huge(model, 2)
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    options = {"budget": 0.7, "calibration": calibrate(model, read), "effort": "fast"}
    compress(plain, **options)
    compress(refined, **options, refine=read, refine_epochs=4)
    with torch.no_grad():
        original, before, after = (
            torch.cat([each(**batch, output_hidden_states=True).hidden_states[-2] for batch in read]).double()
            for each in (model, plain, refined)
        )
    sizes = original.norm(dim=-1)
    assert sizes[:, 0].min() > 50 * sizes[:, 1:].max()
    errors = [float((each - original)[:, 1:].square().sum()) for each in (before, after)]
    assert errors[1] < 0.15 * errors[0]


def make_huge(model, token):
    """As trained models have it: the first block answers to a token with a vector that is very long."""
    block, width = model.layers[0], model.config.hidden_size
    with torch.no_grad():
        # Only this token has a first value, by which the MLP knows it.
        embeddings = model.embed_tokens.weight
        embeddings[:, 0] = block.self_attn.o_proj.weight[0] = 0
        embeddings[token] = torch.eye(width)[0] * embeddings[token].norm()
        for known in (block.mlp.gate_proj, block.mlp.up_proj):
            known.weight[0] = torch.eye(width)[0]
        block.mlp.down_proj.weight[:, 0] = 100


def test_a_single_batch_judges_itself(fast_learning):
    model, read = llama(), some_batches()[:1]
    plain, refined = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, budget=0.6)
    compress(refined, budget=0.6, refine=read, refine_epochs=4)
    assert lost(model, refined, read) < lost(model, plain, read)


@pytest.mark.parametrize(
    ("blocks", "predicts", "windows"),
    [
        (1, True, [(0, 1)]),
        (1, False, [(0, 1)]),
        (2, True, [(0, 2), (1, 2)]),
        (2, False, [(0, 2)]),
        (5, False, [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (5, True, [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]),
        (9, True, [*((first, first + 2) for first in range(7)), (7, 9)]),
        (30, True, [*((first, first + 2) for first in range(26)), (26, 30)]),
    ],
)
def test_blocks_have_their_turns_in_pairs_and_the_last_ones_together(blocks, predicts, windows):
    assert [(window.start, window.stop) for window in refining._windows(blocks, predicts)] == windows


@pytest.mark.parametrize("family", [llama, opt])
def test_the_last_blocks_learn_the_predictions(family, fast_learning, monkeypatch):
    model, read = family(num_hidden_layers=9), some_batches()
    config = TQConfig({"*layers.*": LowRankSpec(3)}, effort="fast")
    students, real = {}, refining._predicts
    for predicts in (True, False):
        students[predicts] = copy.deepcopy(model)
        monkeypatch.setattr(refining, "_predicts", real if predicts else lambda *_: False)
        compress(students[predicts], config, refine=read, refine_epochs=4)
    assert divergence(model, students[True], read) < divergence(model, students[False], read)
    # Two blocks of nine are the last ones, and the pair before them ends with the first of these.
    last = tuple(list(transformer_blocks(model))[-2:])
    for name, value in students[False].state_dict().items():
        assert name.startswith(last) or torch.equal(value, students[True].state_dict()[name]), name


def test_neighbouring_blocks_learn_together(fast_learning, monkeypatch):
    model, read = bert(num_hidden_layers=5), some_batches()
    students, config = {}, TQConfig({"*layer.*": LowRankSpec(3)}, effort="fast")
    for size in (1, 2):
        students[size] = copy.deepcopy(model)
        monkeypatch.setattr(refining, "_WINDOW", size)
        compress(students[size], config, refine=read, refine_epochs=4)
    alone, together = (block_error(model, students[size], read) for size in (1, 2))
    assert together < alone


@pytest.mark.parametrize("family", ["gpt2 base", "bert", "bert classes"])
def test_a_model_that_predicts_no_tokens_learns_its_hidden_states(family, monkeypatch):
    model, seen, real = FAMILIES[family](), [], refining._predicts
    monkeypatch.setattr(refining, "_predicts", lambda *given: seen.append(real(*given)) or seen[-1])
    compress(model, budget=0.7, refine=some_batches(), refine_epochs=1)
    assert seen == [False]


def test_logits_that_read_more_than_the_last_hidden_states_are_not_learned(monkeypatch):
    model, seen, real = gpt2(), [], refining._predicts
    own = type(model).forward

    class Skipping(type(model)):
        @functools.wraps(own)
        def forward(self, *arguments, **keywords):
            kept = []
            handle = self.transformer.h[0].register_forward_hook(lambda _, _inputs, output: kept.append(output))
            found = own(self, *arguments, **keywords)
            handle.remove()
            found.logits = found.logits + self.lm_head(kept[0])
            return found

    model.__class__ = Skipping
    monkeypatch.setattr(refining, "_predicts", lambda *given: seen.append(real(*given)) or seen[-1])
    compress(model, TQConfig({"h.*.mlp.*": LowRankSpec(3)}, effort="fast"), refine=some_batches(), refine_epochs=1)
    assert seen == [False]


def albert():
    config = transformers.AlbertConfig(
        vocab_size=60,
        embedding_size=8,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    return built("AlbertModel", config)


def test_options_that_do_not_fit():
    model = gpt2()
    before = snapshot(model)
    for options, error, message in (
        ({"refine": True}, ConfigError, "refine: expected a text and its tokenizer"),
        ({"refine": []}, TextError, "there are no batches"),
        ({"refine": [torch.tensor([[60]])]}, ConfigError, "expected tokens below 60"),
        ({"refine": batches(), "refine_epochs": 0}, ConfigError, "refine_epochs: expected an integer from 1"),
        ({"refine": batches(), "dtype": "int8"}, ConfigError, "refine: expected float weights"),
    ):
        with pytest.raises(error, match=message):
            compress(model, budget=0.7, **options)
    with pytest.raises(ConfigError, match="refine: expected float weights"):
        compress(model, TQConfig({"wte": LowRankSpec(3)}, dtype="int8"), refine=batches())
    assert_untouched(model, before)
    shared = albert()
    before = snapshot(shared)
    with pytest.raises(ConfigError, match="the blocks of AlbertModel do not each read"):
        compress(shared, budget=0.7, refine=batches())
    assert_untouched(shared, before)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_what_is_not_finite_is_named(block):
    model = gpt2(n_layer=3)
    with torch.no_grad():
        model.transformer.h[block].ln_1.weight[0] = np.inf
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=rf"refine: transformer\.h\.{block} computes NaN or an infinity"):
        compress(model, budget=0.7, refine=batches())
    after = snapshot(model)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert in_place.marks(model) is not None
