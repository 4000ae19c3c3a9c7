"""Wrapped and sharded models: refused at once, by whatever takes a live model, with what to pass instead."""

import copy

import pytest
import torch
import tqcompressor
from helpers.families import LOW_RANK
from helpers.models import some_ids, tiny_model
from tqcompressor.compression.model import compress, recompress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError
from tqcompressor.models.matrices import compressed_modules

CONFIG = TQConfig({"*.c_fc": LOW_RANK}, effort="fast")
WORK = {
    "compress": lambda model: compress(model, CONFIG),
    "recompress": lambda model: recompress(model, CONFIG),
    "plan": lambda model: tqcompressor.plan(model, 0.7),
    "calibrate": lambda model: tqcompressor.calibrate(model, [some_ids()]),
}


@pytest.fixture(scope="module")
def processes():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model), r"OptimizedModule is not a model of transformers: pass model\._orig_mod itself"


def data_parallel(model):
    return torch.nn.DataParallel(model), r"DataParallel is not .*: pass model\.module itself"


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model), r"DistributedDataParallel is not .*: pass model\.module"


def compiled_block(model):
    model.transformer.h[1] = torch.compile(model.transformer.h[1])
    return model, r"transformer\.h\.1 of GPT2LMHeadModel is wrapped in a OptimizedModule: .*unwrap"


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh), r"transformer\.wte\.weight is sharded over processes"


def adapted(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["c_attn"])), "PeftModel is not .*: pass the model itself"


def under_adapters(model):
    adapted(model)
    return model, r"transformer\.h\.0\.attn\.c_attn of GPT2LMHeadModel is wrapped in a Linear: .*merge its adapters"


def in_a_container(model):
    return torch.nn.Sequential(model), "Sequential is not a model of transformers: pass the model itself"


@pytest.mark.parametrize(
    "wrap",
    [compiled, data_parallel, distributed, compiled_block, sharded, adapted, under_adapters, in_a_container],
    ids=lambda wrap: wrap.__name__,
)
def test_a_wrapped_model_is_refused_by_all_that_take_a_live_one(wrap, processes):
    model, message = wrap(tiny_model())
    for name, work in WORK.items():
        with pytest.raises(ConfigError, match=message):
            work(model)
        assert next(compressed_modules(model), None) is None, name


def test_a_model_compiled_in_place_has_its_own_names():
    model = tiny_model()
    # Without a call nothing is compiled.
    copy.deepcopy(model).compile()
    model.compile()
    assert WORK["compress"](model).matrices[0].name == "h.0.mlp.c_fc"


def test_a_wrapped_teacher_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="OptimizedModule is not a model of transformers"):
        tqcompressor.distill(torch.compile(tiny_model()), text="a text", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
