"""What `compress` tries out before it changes anything: classes that it has never seen."""

import pytest
import torch
from helpers.architectures import architecture
from helpers.models import CONFIG, SPECS, first_output, some_ids, tiny_config, tiny_model
from helpers.snapshots import assert_untouched, snapshot
from tqcompressor.compression.model import compress
from tqcompressor.config import TQConfig
from tqcompressor.errors import ConfigError
from transformers import GPT2LMHeadModel


class ReadsAnAttribute(GPT2LMHeadModel):
    """Reads what only its own kind of linear layer has."""

    def forward(self, *args, **kwargs):
        assert self.transformer.h[1].mlp.c_fc.nf == 128
        return super().forward(*args, **kwargs)


class WritesInTraining(GPT2LMHeadModel):
    """Changes a weight in place, while it is trained."""

    def forward(self, *args, **kwargs):
        if self.training:
            self.transformer.h[1].mlp.c_fc.weight.data.mul_(0.5)
        return super().forward(*args, **kwargs)


class WritesAtFirst(GPT2LMHeadModel):
    """Initialises a weight without looking whether it is loaded."""

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is getattr(self, "lm_head", None):
            self.transformer.h[1].mlp.c_fc.weight.data.zero_()


class TakesMore(GPT2LMHeadModel):
    """Cannot be made from a config alone."""

    def __init__(self, config, more):
        super().__init__(config)
        self.more = more


class NeedsMore(GPT2LMHeadModel):
    """Has an input of its own."""

    def forward(self, input_ids, more, **kwargs):
        return super().forward(input_ids * more, **kwargs)


class NeedsWaves(GPT2LMHeadModel):
    """Has a main input of another kind."""

    main_input_name = "waves"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ReadsAnAttribute, "ReadsAnAttribute cannot be run .*nf"),
        (WritesInTraining, r"cannot be run .* because of transformer\.h\.1\.mlp\.c_fc: ReadOnlyError: mul_"),
        (WritesAtFirst, r"cannot be initialised.* because of transformer\.h\.1\.mlp\.c_fc: ReadOnlyError: zero_"),
    ],
)
def test_a_class_that_would_fail_is_refused_by_module_and_reason(cls, message):
    model = cls(tiny_config()).eval()
    before, own = snapshot(model), model.config
    with pytest.raises(ConfigError, match=message):
        compress(model, CONFIG, progress=False)
    assert_untouched(model, before)
    assert model.config is own
    # Its other matrices are compressed.
    compress(model, TQConfig({"h.*.mlp.c_proj": SPECS["h.*.mlp.c_proj"]}, effort="fast"), progress=False)
    first_output(model, some_ids())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: TakesMore(tiny_config(), 1), "TakesMore cannot be made from its config alone .*untested"),
        (lambda: NeedsMore(tiny_config()), "NeedsMore does not run on an example .*untested"),
        (lambda: NeedsWaves(tiny_config()), "NeedsWaves takes waves, .*untested"),
    ],
)
def test_what_cannot_be_tried_is_called_untested(model, message):
    with pytest.warns(UserWarning, match=message):
        compress(model(), TQConfig(SPECS, effort="fast"), progress=False)


def test_a_model_that_is_not_what_its_config_says_is_refused():
    model = tiny_model()
    model.config.n_layer = 1
    with pytest.raises(ConfigError, match=r"not what its config says.*h\.1\.mlp\.c_fc"):
        compress(model, CONFIG, progress=False)
    assert type(model.transformer.h[1].mlp.c_fc).__name__ == "Conv1D"


@pytest.mark.filterwarnings("error")
def test_trying_out_draws_no_random_numbers_and_leaves_buffers_alone():
    model, _, patterns = architecture("SwinForImageClassification")
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    compress(model, budget=0.8, effort="fast", progress=False, matrices=patterns)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3)) and model.training
    after = dict(model.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in buffers.items())
