"""Compressed checkpoints in transformers: loaded in every way, and used like any model.

Numbers in names are those of the pitfalls that a naive integration falls into. What depends on the order of imports, or
on memory, runs in a process of its own.
"""

import pytest
import torch
import transformers
from helpers.models import agree, first_output, some_ids, tiny_model
from helpers.processes import run_script
from helpers.tokenizer import save_tokenizer
from tqcompressor.compression.model import compress
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AutoQuantizationConfig


@pytest.mark.parametrize(
    "imports",
    [
        "import tqcompressor, transformers",
        "import transformers, tqcompressor",
        "import transformers.modeling_utils, tqcompressor",
        "import tqcompressor.integrations.quantizer as integration; integration.register()",
    ],
)
def test_loading_works_whichever_is_imported_first(checkpoints, imports):
    run_script(
        f"""
import sys, torch
assert not {{"tqcompressor", "transformers"}} & sys.modules.keys()
{imports}
from transformers import AutoModelForCausalLM
from helpers.models import agree, first_output, some_ids
model = AutoModelForCausalLM.from_pretrained(f"{{sys.argv[1]}}/compressed")
assert agree(first_output(model, some_ids()), torch.load(f"{{sys.argv[1]}}/compressed.pt"))
""",
        checkpoints,
        warm="torch",
    )


def test_importing_the_package_imports_neither_torch_nor_transformers():
    output = run_script(
        """
import sys, types, tqcompressor
assert not {"torch", "transformers", "safetensors", "tqdm"} & sys.modules.keys()
from tqcompressor.integrations import import_hook
import_hook.install()
hook = "tqcompressor.integrations.import_hook"
ours = lambda: [finder for finder in sys.meta_path if type(finder).__module__ == hook]
assert len(ours()) == 2
import transformers.quantizers.auto as registry
# The hook has removed itself, that for peft waits, and the module has its ordinary loader.
assert [finder.name for finder in ours()] == ["peft.tuners.tuners_utils"]
assert "tqcompressor" in registry.AUTO_QUANTIZER_MAPPING
assert type(registry.__loader__).__name__ == type(registry.__spec__.loader).__name__ == "SourceFileLoader"
import peft.tuners.tuners_utils as tuners
assert not ours() and hasattr(tuners.BaseTuner.inject_adapter, "_without_tqcompressor")
assert "tqcompressor.integrations.peft" not in sys.modules
# An unsupported version of transformers gives a warning and still works.
del sys.modules["tqcompressor.integrations.quantizer"], tqcompressor.integrations.quantizer
del registry.register_quantizer
import_hook.install()
print("still here")
"""
    )
    assert "cannot register with this version of transformers" in output and "still here" in output


def test_4_without_the_package_loading_raises_and_names_it(checkpoints):
    output = run_script(
        """
import sys, transformers
for cls, name in [("AutoModelForCausalLM", "compressed"), ("AutoModel", "compressed"), ("AutoModel", "base")]:
    try:
        getattr(transformers, cls).from_pretrained(f"{sys.argv[1]}/{name}")
    except RuntimeError as error:
        print("raised", error)
assert "tqcompressor" not in sys.modules
""",
        checkpoints,
        warm="transformers",
    )
    assert output.count("raised") == output.count("MISMATCH   |") == 3
    assert "wte.weight" in output and "Unknown quantization type, got tqcompressor" in output


def test_1_2_3_and_7_loading_into_every_class_says_nothing_and_is_exact(checkpoints):
    logits, hidden = (torch.load(f"{checkpoints}/{name}.pt") for name in ("compressed", "base"))
    for name, cls, expected in [
        ("compressed", AutoModelForCausalLM, logits),
        ("untied", AutoModelForCausalLM, torch.load(checkpoints / "untied.pt")),
        ("compressed", AutoModel, hidden),
        ("base", AutoModel, hidden),
        ("base", AutoModelForCausalLM, logits),
    ]:
        model, info = cls.from_pretrained(checkpoints / name, output_loading_info=True)
        assert not any(info.values()), (name, cls, info)
        assert agree(first_output(model, some_ids()), expected), (name, cls)
        assert not model.training and all(parameter.requires_grad for parameter in model.parameters())

    # A head that the checkpoint lacks, and one that the class lacks.
    for name in ("compressed", "base", "untied"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoints / name, num_labels=3, output_loading_info=True
        )
        assert info["missing_keys"] == {"score.weight"}, info
        assert agree(first_output(model.transformer, some_ids()), hidden)
        assert torch.isfinite(model.score.weight).all() and model.score.weight.std() > 0
        assert not any(spec.startswith("lm_head") for spec in model.config.quantization_config.specs)

    # Initialising again leaves the factors alone.
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed")
    model.init_weights()
    model.tie_weights()
    assert agree(first_output(model, some_ids()), logits)
    assert model.lm_head.A is model.transformer.wte.A
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", config=model.config)
    assert agree(first_output(model, some_ids()), logits)
    assert (
        AutoQuantizationConfig.from_pretrained(checkpoints / "compressed").specs
        == model.config.quantization_config.specs
    )


def test_6_dtypes_generation_pipeline_compiling_and_training(checkpoints, tmp_path):
    logits, ids = torch.load(checkpoints / "compressed.pt"), some_ids()

    def load(**options):
        return AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", **options)

    largest = logits.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        for model in (load().to(dtype), load(dtype=dtype), load().half().float().to(dtype)):
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
            assert model.transformer.wte.input_permutation.dtype == torch.int64
            assert (first_output(model, ids).float() - logits).abs().max() < 0.1 * largest
        model.save_pretrained(tmp_path / str(dtype))
        again, expected = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype)).state_dict(), model.state_dict()
        assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)

    model = load()
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        options["attention_mask"] = torch.ones_like(ids)
        cached, plain = (model.generate(ids, max_new_tokens=12, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (first_output(model, ids) - logits).abs().max() < 0.1 * largest
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(ids, use_cache=False).logits, logits, atol=1e-4 * largest)

    model.save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    generator = transformers.pipeline("text-generation", tmp_path / "text")
    assert type(generator.model.transformer.wte).__name__ == "KroneckerEmbedding"
    (result,) = generator("a b c", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("a b c") and len(result["generated_text"]) > 5

    # Every factor gets gradients, tied ones from both uses, with gradient checkpointing and in Trainer.
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    data = [{"input_ids": row, "labels": row} for row in ids] * 2
    before = model.transformer.wte.A.detach().clone()
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(model.transformer.wte.A, before) and model.lm_head.A is model.transformer.wte.A
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2").eval()
    assert agree(first_output(again, ids), first_output(model.eval(), ids))


def test_devices_and_memory(checkpoints, tmp_path):
    logits = torch.load(checkpoints / "compressed.pt")
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", device_map=device_map)
        assert agree(first_output(model, some_ids()), logits)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", device_map="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.lm_head(model.transformer.wte(some_ids().to("meta"))).shape == logits.shape
    assert type(model.lm_head).__name__ == "KroneckerHead" and model.lm_head.A is model.transformer.wte.A
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", device_map="cpu")
    assert agree(first_output(model, some_ids()), logits)
    # Blocks offloaded to disk are brought back when they run.
    blocks = {
        "transformer.wte": "cpu",
        "lm_head": "cpu",
        "transformer.wpe": "cpu",
        "transformer.ln_f": "cpu",
        "transformer.drop": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "compressed", device_map=blocks, offload_folder=tmp_path)
    assert agree(first_output(model, some_ids()), logits)


def test_loading_takes_no_more_memory_than_the_checkpoint_and_200_mb(tmp_path):
    model = tiny_model(n_embd=768, n_layer=4, vocab_size=50256)
    compress(model, {"specs": {"wte": {"block": [1, 4], "rank": 1, "permute": "none"}}}, effort="fast")
    model.save_pretrained(tmp_path)
    assert model.dtype == torch.float32
    del model
    output = run_script(
        """
import sys, os, torch, transformers, tqcompressor, tqcompressor.integrations.quantizer, pathlib
import transformers.models.gpt2.modeling_gpt2
from transformers import AutoModelForCausalLM

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("PEAK", peak() - before, pathlib.Path(sys.argv[1], "model.safetensors").stat().st_size)
""",
        tmp_path,
    )
    used, size = map(int, output.split("PEAK")[1].split()[:2])
    assert size > 150e6
    assert used < size + 200e6
