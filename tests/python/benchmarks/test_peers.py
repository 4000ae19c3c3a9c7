"""The benchmark's peers follow their papers, and none exceeds a budget."""

import itertools
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import bert_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHARES = (0.5, 0.65, 0.8)


@pytest.fixture(scope="module")
def benchmark():
    """Imports a module of the benchmarks by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module


@pytest.fixture(scope="module")
def peers(benchmark):
    return benchmark("peers")


def example(rows=24, columns=16, tokens=200, seed=0):
    """A matrix, correlated inputs of very different scales, and their moment."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((rows, rows)) * np.geomspace(0.01, 10, rows)
    x = generator.standard_normal((tokens, rows)) @ mixing
    return generator.standard_normal((rows, columns)), x, x.T @ x


def loss(x, w, approximation):
    return ((x @ (w - approximation)) ** 2).sum()


def test_svd_loses_the_tail_of_its_spectrum(peers):
    w, _, _ = example()
    spectrum = peers.svd(w)
    np.testing.assert_allclose(spectrum.truncated(16), w, atol=1e-12)
    for rank in range(16):
        assert ((w - spectrum.truncated(rank)) ** 2).sum() == pytest.approx(spectrum.tail(rank))


@pytest.mark.parametrize("method", ["svd_llm", "svd_llm_v2"])
def test_whitened_methods_lose_the_tail_of_the_whitened_spectrum(peers, method):
    w, x, moment = example()
    spectrum = getattr(peers, method)(w, moment)
    for rank in range(16):
        assert loss(x, w, spectrum.truncated(rank)) == pytest.approx(spectrum.tail(rank), rel=1e-6)
        # No other matrix of this rank is nearer: not that of another norm, nor one close by.
        assert loss(x, w, peers.svd(w).truncated(rank)) >= spectrum.tail(rank) * (1 - 1e-9)
        nearby = spectrum.left[:, :rank] @ (spectrum.right[:rank] + 1e-3)
        assert loss(x, w, nearby) >= spectrum.tail(rank) * (1 - 1e-9)


def test_cholesky_and_eigenvectors_give_the_same_matrix(peers):
    w, _, moment = example()
    for rank in (3, 8, 15):
        by_cholesky, by_eigenvectors = (
            method(w, moment).truncated(rank) for method in (peers.svd_llm, peers.svd_llm_v2)
        )
        np.testing.assert_allclose(by_cholesky, by_eigenvectors, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["svd_llm", "svd_llm_v2"])
def test_a_singular_moment_is_fitted_where_there_are_inputs(peers, method):
    w, x, _ = example(tokens=9)
    x[:, 3] = 0
    spectrum = getattr(peers, method)(w, x.T @ x)
    best = np.linalg.svd(x @ w, compute_uv=False)
    for rank in (2, 5):
        approximation = spectrum.truncated(rank)
        assert np.isfinite(approximation).all()
        assert loss(x, w, approximation) == pytest.approx((best[rank:] ** 2).sum(), rel=1e-3)


def two_sided_loss(w, approximation, inputs, gradients):
    error = w - approximation
    return np.trace(inputs @ error @ gradients @ error.T)


def test_two_sided_loses_the_tail_of_its_spectrum(peers):
    w, _, inputs = example()
    _, _, gradients = example(16, 24, seed=3)
    spectrum = peers.two_sided(w, inputs, gradients)
    for rank in range(16):
        lost = two_sided_loss(w, spectrum.truncated(rank), inputs, gradients)
        assert lost == pytest.approx(spectrum.tail(rank), rel=1e-6)
        one_sided = peers.svd_llm(w, inputs).truncated(rank)
        assert two_sided_loss(w, one_sided, inputs, gradients) >= lost * (1 - 1e-9)


def test_anchored_fits_the_original_outputs_from_shifted_inputs(peers):
    w, x, _ = example()
    shifted = x + np.random.default_rng(1).standard_normal(x.shape) * 0.3
    spectrum = peers.anchored(w, shifted.T @ shifted, shifted.T @ x)

    def lost(approximation):
        return ((x @ w - shifted @ approximation) ** 2).sum()

    best = np.linalg.lstsq(shifted, x @ w, rcond=None)[0]
    for rank in (4, 9, 15):
        assert lost(spectrum.truncated(rank)) == pytest.approx(lost(best) + spectrum.tail(rank), rel=1e-6)
        for other in (peers.svd_llm(w, x.T @ x), peers.svd_llm(w, shifted.T @ shifted)):
            assert lost(spectrum.truncated(rank)) < lost(other.truncated(rank))


def test_global_ranks_lose_the_least_within_the_parameters(peers):
    spectra = {name: peers.svd(example(rows, columns, seed=seed)[0] * scale) for name, rows, columns, seed, scale in (
        ("wide", 12, 20, 0, 1.0), ("square", 12, 12, 1, 3.0), ("small", 6, 12, 2, 0.1)
    )}  # fmt: skip

    def parameters(ranks):
        shapes = {name: spectrum.shape for name, spectrum in spectra.items()}
        return sum(np.prod(shapes[name]) if rank is None else rank * sum(shapes[name]) for name, rank in ranks.items())

    def lost(ranks):
        return sum(0.0 if rank is None else spectra[name].tail(rank) for name, rank in ranks.items())

    for budget in (60, 150, 260, 400):
        chosen = peers.global_ranks(spectra, budget)
        assert parameters(chosen) <= budget
        every = itertools.product(*([*range(8), None] for _ in spectra))
        within = [
            ranks for each in every if parameters(ranks := dict(zip(spectra, each, strict=True))) <= parameters(chosen)
        ]
        assert lost(chosen) <= min(map(lost, within)) * (1 + 1e-9)
    assert set(peers.global_ranks(spectra, 12 * 20 + 12 * 12 + 6 * 12).values()) == {None}


def test_nystrom_fits_the_units_that_stay(peers):
    w, x, moment = example()
    fitted = peers.nystrom(moment, w, 10)
    kept = np.flatnonzero(fitted.any(1))
    assert len(kept) == 10
    np.testing.assert_allclose(fitted[kept], np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0], rtol=1e-4, atol=1e-6)


def test_heads_of_modegpt(peers):
    query, x, moment = example(24, 8)
    key, _, _ = example(24, 8, seed=5)
    scores = np.linalg.norm(x @ query, axis=0) * np.linalg.norm(x @ key, axis=0)
    np.testing.assert_array_equal(peers.kept_of_head(moment, [query], key, 3, False), np.sort(np.argsort(-scores)[:3]))
    pairs = peers.kept_of_head(moment, [query], key, 4, True)
    assert set(pairs) == {*pairs[:2], *(pairs[:2] + 4)}
    outputs = np.random.default_rng(2).standard_normal((8, 30))
    value, fitted = peers.value_and_output(moment, query, outputs, 5)
    tail = np.linalg.svd(x @ query @ outputs, compute_uv=False)[5:]
    assert loss(x, query @ outputs, value @ fitted) == pytest.approx((tail**2).sum(), rel=1e-6)
    assert not value[:, 5:].any() and not fitted[5:].any()


def test_modegpt_with_all_dimensions_is_the_model(benchmark):
    """Queries that share a key, rotary embeddings, a gate, and biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    data, methods = benchmark("quality_data"), benchmark("quality_methods")
    names = [f"model.layers.{index}." for index in range(2)]
    blocks = [
        data.Block(
            tuple(f"{name}self_attn.{kind}_proj" for kind in "qkv"),
            f"{name}self_attn.o_proj",
            f"{name}mlp.up_proj",
            f"{name}mlp.down_proj",
            f"{name}mlp.gate_proj",
        )
        for name in names
    ]
    ids = torch.randint(60, (20, 16))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    subject = data.Subject(
        "", model, blocks, 4, "model.layers", "model.embed_tokens", lambda _: batches, dict, key_heads=2, rotary=True
    )
    study = methods.Study(subject, 0)
    before = model(ids).logits
    for share, nearest, furthest in ((1.0, 0.0, 1e-4), (0.5, 1e-3, 1.0)):
        smaller, kept = subject.copy(), 0
        for block in blocks:
            kept += methods.smaller_attention(smaller, study, block, share)
            kept += methods.smaller_mlp(smaller, study, block, share)
        assert kept == share * methods.matrices_parameters(model, subject.layers)
        distance = (smaller(ids).logits - before).norm() / before.norm()
        assert nearest <= distance < furthest


def test_shares_of_modegpt_are_the_budget_on_average(peers):
    influences = np.array([0.5, 0.1, 0.05, 0.3])
    for share in SHARES:
        shares = peers.modegpt_shares(influences, share, 0.1)
        assert shares.mean() == pytest.approx(share)
        np.testing.assert_array_equal(np.argsort(shares), np.argsort(influences))
        assert shares.min() > 0 and shares.max() < 1


def test_asvd_is_the_svd_of_the_scaled_matrix(peers):
    w, x, _ = example()
    x[:, 5] = 0
    mean_absolute = np.abs(x).mean(0)
    spectrum = peers.asvd(w, mean_absolute)
    scale = np.sqrt(mean_absolute)
    scale[5] = scale[scale > 0].min()
    for rank in (1, 7):
        error = scale[:, None] * (w - spectrum.truncated(rank))
        assert (error**2).sum() == pytest.approx(spectrum.tail(rank))
        assert np.linalg.matrix_rank(spectrum.truncated(rank)) == rank
    np.testing.assert_allclose(peers.asvd(w, mean_absolute, 0.0).truncated(4), peers.svd(w).truncated(4))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_pifa_is_exact_in_fewer_parameters(peers, shape):
    w, _, moment = example(*shape)
    spectrum = peers.svd_llm(w, moment)
    for rank in (1, 6, 15):
        factored = peers.pifa(spectrum.left[:, :rank], spectrum.right[:rank])
        truncated = spectrum.truncated(rank)
        np.testing.assert_allclose(factored.matrix(), truncated, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(factored.columns, truncated[:, factored.pivots], rtol=1e-8, atol=1e-10)
        assert factored.parameters == rank * (sum(shape) - rank) < rank * sum(shape)


@given(st.integers(2, 60), st.integers(2, 60), st.floats(0, 1, exclude_max=True))
def test_ranks_use_the_budget_and_no_more(benchmark, rows, columns, share):
    peers, budget = benchmark("peers"), share * rows * columns
    rank = peers.low_rank_within((rows, columns), budget)
    assert rank * (rows + columns) <= budget < (rank + 1) * (rows + columns)
    rank = peers.pifa_rank_within((rows, columns), budget)
    assert rank * (rows + columns - rank) <= budget
    assert rank == min(rows, columns) or budget < (rank + 1) * (rows + columns - rank - 1)


def test_ratios_of_svd_llm_v2(peers):
    """The mean of each group is kept; within a group the matrix of the larger loss keeps more."""
    spectra = {f"{kind}.{n}": peers.svd(example(seed=n)[0] * 10.0**n) for kind in "ab" for n in range(3)}
    groups = {name: name[0] for name in spectra}
    shares = peers.svd_llm_v2_shares(spectra, groups, 0.6)
    for kind in "ab":
        of_group = [shares[f"{kind}.{n}"] for n in range(3)]
        assert np.mean(of_group) == pytest.approx(0.6)
        assert of_group == sorted(of_group)
        assert of_group[0] < of_group[2]
    logs = [np.log(spectra[f"a.{n}"].tail(5)) for n in range(3)]  # 0.6 · 24 · 16 parameters: rank 5
    removed = [1 - shares[f"a.{n}"] for n in range(3)]
    np.testing.assert_allclose(np.array(removed) * logs, removed[0] * logs[0])

    alike = {"a.0": spectra["a.1"], "a.1": spectra["a.1"]}
    assert set(peers.svd_llm_v2_shares(alike, groups, 0.6).values()) == {0.6}
    with pytest.raises(ValueError, match=r"a\.0.*loss above 1"):
        peers.svd_llm_v2_shares({"a.0": peers.svd(example()[0] * 1e-3)}, groups, 0.6)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_kronecker_sums_of_the_recipe_block(peers, shape):
    generator = np.random.default_rng(0)
    block = peers.recipe_block(shape)
    assert block == ((2, 4) if shape[0] < shape[1] else (4, 2))
    outer = (shape[0] // block[0], shape[1] // block[1])
    a, b = generator.standard_normal((2, *outer)), generator.standard_normal((2, *block))
    w = np.kron(a[0], b[0]) + np.kron(a[1], b[1])
    assert peers.kronecker_parameters(shape, 2) == a.size + b.size
    np.testing.assert_allclose(peers.kronecker(w, 2, permuted=False), w, atol=1e-12)
    other, _, _ = example(*shape)
    unpermuted, permuted = (((other - peers.kronecker(other, 2, way)) ** 2).sum() for way in (False, True))
    assert 0 < permuted < unpermuted


def test_ranks_are_dealt_where_they_gain_most(peers):
    shapes = dict.fromkeys("abc", (16, 24))
    errors = {"a": (0.5, 0.45), "b": (0.5, 0.3), "c": (0.5, 0.4)}
    one = peers.kronecker_parameters((16, 24), 1)
    assert peers.dealt_ranks(shapes, errors, 3, 11.9 * one) == {"a": 3, "b": 4, "c": 4}
    assert peers.dealt_ranks(shapes, errors, 3, 9 * one) == {"a": 3, "b": 3, "c": 3}


def test_pruning_and_dropping_fill_the_budget(peers):
    for share in SHARES:
        heads, units = peers.kept_of_block(384, 1536, 12, share)
        kept = 4 * 384 * 32 * heads + 2 * 384 * units
        assert share * 1_769_472 - 2 * 384 < kept <= share * 1_769_472
    assert peers.kept_of_block(384, 1536, 12, 0.5) == (6, 768)
    assert peers.kept_layers(12, 0.5) == [0, 2, 4, 7, 9, 11]
    assert peers.kept_layers(6, 0.65) == [0, 2, 5]
    np.testing.assert_array_equal(peers.strongest(np.array([3.0, 1.0, 5.0, 4.0]), 2), [2, 3])


def small_subject(data, kind):
    """A random model of three blocks with random calibration ids, the shorter ones padded."""
    torch.manual_seed(0)
    if kind == "bert":
        config = bert_config(vocab_size=120, num_hidden_layers=3, max_position_embeddings=16, initializer_range=0.02)
        model, prefix, word = BertModel(config).eval(), "encoder.layer", "embeddings.word_embeddings"
        parts = "attention.self.query attention.self.key attention.self.value"
        others = ("attention.output.dense", "intermediate.dense", "output.dense")
    else:
        config = GPT2Config(
            vocab_size=120, n_positions=16, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config).eval()
        prefix, word, parts = "transformer.h", "transformer.wte", "attn.c_attn"
        others = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    with torch.no_grad():
        # Larger than they are initialised, so that the losses are those of a trained model: above 1.
        for parameter in model.parameters():
            parameter.copy_(parameter * 10 if parameter.ndim == 2 else parameter)
    blocks = [
        data.Block(
            tuple(f"{prefix}.{index}.{name}" for name in parts.split()),
            *(f"{prefix}.{index}.{name}" for name in others),
        )
        for index in range(3)
    ]

    def calibration(seed):
        ids = torch.randint(0, 120, (12, 16), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[6:, 10:] = 0
        return [{"input_ids": ids[:6], "attention_mask": mask[:6]}, {"input_ids": ids[6:], "attention_mask": mask[6:]}]

    return data.Subject(kind, model, blocks, 4, prefix, word, calibration, lambda model: {})


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def study(benchmark, request):
    subject = small_subject(benchmark("quality_data"), request.param)
    return benchmark("quality_methods").Study(subject, 0)


def test_inputs_are_those_of_real_tokens_only(benchmark, study):
    data, subject, name = benchmark("quality_data"), study.subject, study.subject.blocks[1].down
    inputs, counts = data.collect_inputs(subject, study.batches), data.token_counts(subject, study.batches)
    seen = []
    handle = subject.model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in study.batches:
            subject.model(**batch)
    handle.remove()
    x = torch.cat([seen[0].flatten(0, 1), seen[1][:, :10].flatten(0, 1)]).double().numpy()
    assert inputs[name].tokens == len(x) == counts.sum() == 6 * 16 + 6 * 10
    np.testing.assert_allclose(inputs[name].moment, x.T @ x)
    np.testing.assert_allclose(inputs[name].mean_absolute, np.abs(x).mean(0))


@pytest.mark.parametrize("share", SHARES)
def test_no_method_exceeds_its_budget(benchmark, study, share):
    methods, data, subject = benchmark("quality_methods"), benchmark("quality_data"), study.subject
    size = methods.matrices_parameters(subject.model, subject.layers)
    total = subject.model.num_parameters()
    for scope, table, counted in (("blocks", methods.METHODS, size), ("whole", methods.WHOLE_METHODS, total)):
        for name, method in table.items():
            if name in methods.OURS:
                continue
            model, parameters = method.compress(study, share)
            # The coarsest: two blocks of three, or one.
            assert counted / 3 * share < parameters <= share * counted, (scope, name)
            outputs = [of(**study.batches[0], use_cache=False)[0] for of in (model, subject.model)]
            assert torch.isfinite(outputs[0]).all()
            assert not torch.allclose(*outputs), (scope, name)
            if scope == "blocks" and name in ("SVD", "ASVD", "SVD-LLM", "SVD-LLM V2"):
                matrices = [data.matrix(model, layer) for layer in subject.layers]
                ranks = [np.linalg.matrix_rank(w, tol=1e-4 * np.linalg.norm(w)) for w in matrices]
                assert parameters == sum(rank * sum(w.shape) for rank, w in zip(ranks, matrices, strict=True))
            if scope == "whole":
                continue
            # All modules outside the blocks are unchanged.
            before, after = (of.get_submodule(subject.word_embedding).weight for of in (subject.model, model))
            torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_aa_svd_of_full_rank_is_the_model(benchmark, study):
    model, _ = benchmark("quality_methods").aa_svd(study, 2.0)
    outputs = [of(**study.batches[1], use_cache=False)[0] for of in (model, study.subject.model)]
    mask = study.batches[1]["attention_mask"].bool()
    distance = (outputs[0] - outputs[1])[mask].norm() / outputs[1][mask].norm()
    assert distance < 1e-3


def test_pruned_units_can_be_taken_out(benchmark, study):
    """Zeroing the weights that read the removed units equals smaller matrices."""
    methods, subject = benchmark("quality_methods"), study.subject
    model, _ = methods.METHODS["pruned by magnitude"].compress(study, 0.5)
    for block in subject.blocks:
        down = benchmark("quality_data").matrix(model, block.down)
        output = benchmark("quality_data").matrix(model, block.attention_output).reshape(4, -1)
        assert (down == 0).all(1).sum() == len(down) / 2
        assert (output == 0).all(1).sum() == 2
    with torch.no_grad():
        for block in subject.blocks:
            up = model.get_submodule(block.up)
            removed = torch.from_numpy((benchmark("quality_data").matrix(model, block.down) == 0).all(1))
            before = model(**study.batches[0])[0]
            up.bias[removed] = 7.0
            torch.testing.assert_close(model(**study.batches[0])[0], before, rtol=0, atol=0)
