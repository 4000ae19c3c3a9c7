"""Layer by layer: the groups, moments that reflect changes to earlier layers, and compression with them."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import read_safetensors
from helpers.measured import FAMILIES, batches, bert, gpt2, llama, opt, same, state
from helpers.models import agree, first_output, some_ids, tiny_model
from helpers.snapshots import assert_untouched, snapshot
from helpers.tokenizer import save_tokenizer
from tqcompressor import Calibration, compress, token_blocks
from tqcompressor.calibration.batches import batches_of
from tqcompressor.calibration.calibrate import calibrate
from tqcompressor.calibration.hooks import ReadingPass
from tqcompressor.calibration.sequential import calibrate_layers, layer_groups
from tqcompressor.calibration.units import units
from tqcompressor.compression import model as in_place
from tqcompressor.errors import ConfigError, ShapeError, TextError
from tqcompressor.modules import KroneckerLinear, LowRankLinear


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_hold_every_matrix_once(family):
    model = FAMILIES[family]()
    groups = layer_groups(model, batches()[0])
    matrices = [matrix for group in groups for matrix in group.matrices]
    expected = [name for unit in units(model) if unit.tied_to is None for name, _ in unit.outputs]
    assert sorted(matrices) == sorted(expected) and len(set(matrices)) == len(matrices)
    assert [group.block is None for group in groups[:3]] == [True, False, False]
    for index, group in enumerate(groups[1:3]):
        assert all(f".{index}." in matrix for matrix in group.matrices)
    assert all(group.block is None for group in groups[3:]) and len(groups) <= 4


def test_groups_are_in_the_order_of_the_computation():
    # The projection from the blocks to a narrower embedding is registered before the blocks.
    groups = layer_groups(opt(word_embed_proj_dim=8), batches()[0])
    assert "decoder.project_in" in groups[0].matrices
    assert "decoder.project_out" in groups[3].matrices
    assert layer_groups(llama(), batches()[0])[3].matrices == ("lm_head",)
    assert layer_groups(bert(), batches()[0])[3].matrices == ("pooler.dense",)


def test_blocks_that_run_several_times_end_no_pass():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, input_ids):
            x = self.embedding(input_ids)
            for index in (0, 1, 0):
                x = self.blocks[index](x)
            return x

    groups = layer_groups(Twice(), {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert [(group.matrices, group.block) for group in groups] == [
        (("embedding",), None),
        (("blocks.0",), None),
        (("blocks.1",), "blocks.1"),
    ]
    with pytest.raises(ConfigError, match="LayerNorm has no linear layer"):
        layer_groups(torch.nn.LayerNorm(3), {})


@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_untouched_layers_have_the_moments_of_the_whole_model(family, sensitivity):
    model = FAMILIES[family]()
    before = state(model)
    moments = {}
    for _, found in calibrate_layers(model, batches(), sensitivity=sensitivity):
        assert not moments.keys() & found.moments.keys()
        moments |= found.moments
        assert found.tokens == 41 and found.sensitivity == sensitivity
        assert state(model)["hooks"] == 0 and state(model)["required"] == before["required"]
    assert same(Calibration(moments, 41), calibrate(FAMILIES[family](), batches(), sensitivity=sensitivity))


@pytest.mark.parametrize("with_original", [False, True])
def test_a_group_sees_what_was_done_to_those_before(with_original):
    model = gpt2()
    original = calibrate(model, batches()) if with_original else None
    for group, found in calibrate_layers(model, batches(), original=original):
        now = calibrate(model, batches())
        for name, moment in found.moments.items():
            expected = now if name.startswith("input.") or original is None else original
            if "wte" in name or "wpe" in name:
                expected = original or now
            assert np.array_equal(moment, expected.moments[name]), name
        assert len(found.moments) == (4 if "wte" in group.matrices else 10)
        assert found.sensitivity
        if group.block is not None:
            damage(model, group)
    if with_original:
        changed = [name for name, moment in original.moments.items() if not np.array_equal(moment, now.moments[name])]
        assert any(name.startswith("input.h.1.") for name in changed)


def damage(model, group):
    """Replaces a layer by a module of another kind with other values."""
    block = model.get_submodule(group.block)
    torch.manual_seed(1)
    block.mlp.c_fc = KroneckerLinear(16, 64, (2, 2), 2)


def test_only_what_is_named_is_measured():
    model = gpt2()
    original = calibrate(model, batches())
    named = ("wpe", "h.1.mlp.c_fc")
    found = list(calibrate_layers(model, batches(), original=original, matrices=named))
    assert [group.matrices for group, _ in found] == [("wpe",), ("h.1.mlp.c_fc",)]
    assert [sorted(moments.moments) for _, moments in found] == [
        ["input.wpe", "output.wpe"],
        ["input.h.1.mlp.c_fc", "output.h.1.mlp.c_fc"],
    ]


def test_a_pass_without_gradients_ends_behind_the_block():
    model = gpt2()
    calls = []
    for index, block in enumerate(model.transformer.h):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    layers = calibrate_layers(model, batches(), original=calibrate(model, batches()))
    for expected in ([], [0, 0], [0, 1, 0, 1]):
        calls.clear()
        next(layers)
        assert calls == expected
    with pytest.raises(StopIteration):
        next(layers)


def test_progress_counts_each_group_once():
    model = tiny_model()
    done = []
    for _ in calibrate_layers(model, batches(), max_memory=1 << 20, progress=lambda *state: done.append(state)):
        pass
    assert done[-1] == (6, 6) and done == sorted(done)
    assert {total for _, total in done} == {6}


def test_leaving_early_leaves_nothing_behind():
    model = gpt2()
    before = state(model)
    layers = calibrate_layers(model, batches())
    next(layers)
    layers.close()
    after = state(model)
    assert (after["hooks"], after["training"], after["required"]) == (0, before["training"], before["required"])


def test_errors_come_before_the_first_group():
    with pytest.raises(TextError, match="there are no batches"):
        calibrate_layers(gpt2(), [])
    other = calibrate(tiny_model(), batches())
    with pytest.raises(ShapeError, match="it is of another model"):
        calibrate_layers(gpt2(), batches(), original=other)


# Compression with such moments.


@pytest.mark.parametrize("sensitivity", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_fitted_to_their_inputs_in_the_model_compressed_so_far(family, sensitivity):
    model = FAMILIES[family]()
    original = calibrate(model, batches(), sensitivity=sensitivity)
    student = copy.deepcopy(model)
    report = compress(student, budget=0.8, calibration=original, sequential=batches())
    config = student.config.quantization_config
    assert report.parameters_after == student.num_parameters() <= 0.8 * model.num_parameters()
    # Layers that read the last block's input, which does not change afterwards.
    groups = layer_groups(model, batches()[0])
    last = next(name for name in groups[2].matrices if name in config.specs)
    module = last.removesuffix(".q")
    now = calibrate(student, batches(), sensitivity=False).input(last)
    assert not np.allclose(now, original.input(last), rtol=1e-3)
    known = Calibration({**original.moments, f"input.{module}": now}, 41, sensitivity=sensitivity)
    for calibration, expected in ((known, True), (original, False)):
        other = copy.deepcopy(model)
        compress(other, config, calibration=calibration)
        factors = [dict(each.base_model.named_parameters()) for each in (student, other)]
        names = [name for name in factors[0] if last in name and not name.endswith("bias")]
        assert names and all(torch.equal(factors[0][name], factors[1][name]) for name in names) == expected
        # The inputs of embeddings are tokens, whatever is compressed.
        assert all(torch.equal(value, factors[1][name]) for name, value in factors[0].items() if "embed" in name)


def test_report_and_checkpoint_are_like_those_of_the_ordinary_way(tmp_path):
    model = gpt2()
    calibration = calibrate(model, batches())
    options = {"budget": 0.7, "calibration": calibration, "seed": 4}
    found = {}
    for name, sequential in (("ordinary", None), ("sequential", batches())):
        student = copy.deepcopy(model)
        report = compress(student, **options, sequential=sequential)
        student.save_pretrained(tmp_path / name)
        stored = read_safetensors(tmp_path / name)
        config = (tmp_path / name / "config.json").read_bytes()
        form = report.to_dict()
        for varying in (form, *form["matrices"]):
            assert varying.pop("seconds") > 0
        assert all(0 < matrix.pop("lost_energy") < 1 for matrix in form["matrices"])
        found[name] = [config, form, {tensor: value[:2] for tensor, value in stored.items()}]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = some_ids() % 60
        assert agree(first_output(loaded, ids), first_output(student, ids))
    assert found["ordinary"] == found["sequential"]


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_threads_and_runs_do_not_show(effort, tmp_path):
    model = gpt2()
    calibration = calibrate(model, batches())
    seen = []
    for run, threads in enumerate([1, 2, 3, 3, None]):
        student = copy.deepcopy(model)
        options = {"calibration": calibration, "sequential": batches(), "effort": effort, "seed": 2, "threads": threads}
        compress(student, budget=0.7, **options)
        student.save_pretrained(tmp_path / str(run))
        seen.append((tmp_path / str(run) / "model.safetensors").read_bytes())
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize(("owner", "work"), [(ReadingPass, "read"), (in_place._core, "fit_many"), (in_place, "attach")])
def test_interrupted_in_the_middle_the_model_is_as_it_was(owner, work, monkeypatch):
    model = gpt2()
    calibration = calibrate(model, batches())
    before = snapshot(model)
    real, compressed = getattr(owner, work), []

    def interrupt(*arguments, **options):
        compressed.append(sum(isinstance(module, LowRankLinear) for module in model.modules()))
        if compressed[-1] > 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(owner, work, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(model, budget=0.7, calibration=calibration, sequential=batches())
    # The state at the error: the first block compressed, or both.
    assert compressed[-1] > 3
    assert_untouched(model, before)
    assert state(model)["hooks"] == 0
    monkeypatch.undo()
    compress(model, budget=0.7, calibration=calibration, sequential=batches())


@pytest.mark.parametrize("done_at", [0.2, 0.5, 0.8])
def test_interrupted_by_the_progress_callback_the_model_is_as_it_was(done_at):
    model = gpt2()
    calibration = calibrate(model, batches())
    config = compress(copy.deepcopy(model), budget=0.7, calibration=calibration).to_dict()["matrices"]
    config = {"specs": {matrix["name"]: {"rank": matrix["rank"]} for matrix in config}}
    before = snapshot(model)

    def progress(done, total):
        if done >= done_at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, config, calibration=calibration, sequential=batches(), progress=progress)
    assert_untouched(model, before)
    seen = []
    compress(model, config, calibration=calibration, sequential=batches(), progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and len(set(seen)) > 4
    assert seen[-1][0] == seen[-1][1] > 0


def test_texts_are_those_that_calibrate_takes(tmp_path):
    model, tokenizer = tiny_model(), save_tokenizer(tmp_path)
    text = "the letters of a text, one by one, and then some. " * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    drawn = batches_of(model, tokenizer, text, num_samples=128, seq_len=None, seed=5)
    calibration = calibrate(model, drawn[:1], seed=5)
    config = {"specs": {"h.0.mlp.c_proj": {"rank": 16}, "h.1.mlp.c_proj": {"rank": 16}}, "effort": "fast"}
    blocks = token_blocks(tmp_path / "text.txt", tokenizer, 32, cache=tmp_path, progress=False)
    factors = []
    for texts in (drawn, iter(drawn), (tokenizer, text), (tokenizer, tmp_path / "text.txt"), blocks):
        student = copy.deepcopy(model)
        compress(student, config, calibration=calibration, sequential=texts)
        factors.append(student.transformer.h[1].mlp.c_proj.left)
    assert all(torch.equal(factors[0], other) for other in factors)
    with pytest.raises(TextError, match="expected 128 sequences"):
        compress(model, config, calibration=calibration, sequential=(tokenizer, text[:1000]))


def test_options_that_do_not_fit():
    model = gpt2()
    calibration = calibrate(model, batches())
    before = snapshot(model)
    for options in ({}, {"calibration": calibration, "objective": "frobenius"}):
        with pytest.raises(ConfigError, match="sequential: expected with a calibration"):
            compress(model, budget=0.7, sequential=batches(), **options)
    with pytest.raises(TextError, match="there are no batches"):
        compress(model, budget=0.7, calibration=calibration, sequential=[])
    with pytest.raises(ConfigError, match="expected tokens below 60"):
        compress(model, budget=0.7, calibration=calibration, sequential=[torch.tensor([[60]])])
    assert_untouched(model, before)
