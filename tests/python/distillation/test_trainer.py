"""The distillation trainer: its loss against a formula in plain torch, checkpoints, and resuming."""

import copy
import errno

import numpy as np
import pytest
import torch
from helpers.models import VOCABULARY, tiny_model
from helpers.tokenizer import save_tokenizer
from torch.nn import functional
from tqcompressor import KroneckerSpec, TQConfig, token_blocks
from tqcompressor.compression.model import compress
from tqcompressor.distillation.artifacts import COMPLETE, last_complete_checkpoint
from tqcompressor.distillation.config import DistillConfig, TrainingConfig
from tqcompressor.distillation.teacher_cache import CachedTeacherDataset, cache_teacher
from tqcompressor.distillation.trainer import DistillTrainer, require_same_tokenizer
from tqcompressor.errors import ConfigError, StorageError
from transformers import PrinterCallback, TrainingArguments

SPECS = {"wte": KroneckerSpec((1, 4), 1, "columns"), "h.1.mlp.c_*": KroneckerSpec((2, 2), 2)}


class Samples:
    """Random sequences of tokens."""

    def __init__(self, count=32, size=16, seed=0, **columns):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (count, size), generator=generator)
        self.columns = columns

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], **{name: values[index] for name, values in self.columns.items()}}


def make_student(seed=1):
    student = tiny_model(seed=seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    compress(student, TQConfig(SPECS, effort="fast"))
    return student


def make_trainer(folder, student, teacher, distill=None, samples=None, **arguments):
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **arguments,
    }
    trainer = DistillTrainer(
        student, TrainingArguments(**options), teacher=teacher, distill=distill, train_dataset=samples or Samples()
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def oracle(student, teacher, batch, distill):
    """The loss in plain torch, in double precision."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels", ids if mask is None else ids.masked_fill(mask == 0, -100))[:, 1:]
    inputs = {"input_ids": ids, "attention_mask": mask}
    ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    counted = labels != -100
    s, t = ours.logits[:, :-1][counted].double(), theirs.logits[:, :-1][counted].double()
    divergence = functional.kl_div(
        functional.log_softmax(s / distill.temperature, -1),
        functional.log_softmax(t / distill.temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    loss = distill.alpha * distill.temperature**2 * divergence
    loss = loss + (1 - distill.alpha) * functional.cross_entropy(s, labels[counted])
    weight = distill.hidden_weight
    # Student and teacher have equal widths and layers here.
    weight = float(distill.alpha > 0) if weight is None else weight
    if weight:
        attended = torch.ones_like(ids) if mask is None else mask
        distances = []
        for our, their in distill.hidden_layers or ((1, 1), (2, 2)):
            a = ours.hidden_states[our][attended.bool()].double()
            b = theirs.hidden_states[their][attended.bool()].double()
            kinds = {
                "mse": ((a - b) ** 2).mean(),
                "relative_mse": ((a - b) ** 2).mean() / (b**2).mean(),
                "cosine": (1 - functional.cosine_similarity(a, b)).mean(),
            }
            distances.append(kinds[distill.hidden_kind])
        loss = loss + weight * torch.stack(distances).mean()
    return loss


@pytest.mark.parametrize(
    "distill",
    [
        DistillConfig(),
        DistillConfig(temperature=3.0, alpha=1.0),
        DistillConfig(alpha=0.0, hidden_weight=0.5, hidden_kind="mse"),
        DistillConfig(temperature=2.0, alpha=0.5, hidden_weight=0.0),
        DistillConfig(hidden_weight=2.0, hidden_kind="cosine", hidden_layers={0: 0, 2: 1}),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_equal_the_formula(distill, padded, tmp_path):
    student, teacher = make_student(), tiny_model()
    trainer = make_trainer(tmp_path, student, teacher, distill)
    batch = {"input_ids": Samples().ids[:4]}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 10:] = 0
    student.train()
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    expected = oracle(student, teacher, batch, distill)
    expected.backward()
    assert np.isclose(loss.item(), expected.item(), rtol=1e-5)
    for name, parameter in student.named_parameters():
        largest = parameter.grad.abs().max()
        assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-4 * largest), name


def with_last(model, last):
    """The model, whose logits pass a last operation."""
    model.lm_head.register_forward_hook(lambda module, inputs, logits: last(logits))
    return model


@pytest.mark.parametrize("distill", [DistillConfig(), DistillConfig(alpha=0.0, hidden_weight=0.0)])
@pytest.mark.parametrize(
    ("last", "overwritten"),
    [
        (lambda logits: logits, True),
        (lambda logits: 30.0 * torch.tanh(logits / 30.0), True),
        (lambda logits: logits.bfloat16().float(), True),
        (torch.tanh, False),
        (lambda logits: logits.log_softmax(-1), False),
        (lambda logits: logits.transpose(0, 1).contiguous().transpose(0, 1), False),
    ],
    ids=["head", "soft cap", "upcast", "tanh", "log softmax", "strided"],
)
def test_a_training_step_overwrites_its_logits_where_nothing_needs_them(distill, last, overwritten, tmp_path):
    student = with_last(make_student(), last)
    trainer = make_trainer(tmp_path, student, tiny_model(), distill)
    kept, batch = [], {"input_ids": Samples().ids[:4]}
    student.register_forward_hook(lambda module, inputs, outputs: kept.append((outputs.logits, outputs.logits.clone())))
    student.train()
    losses, gradients = [], []
    for return_outputs in (False, True):
        loss = trainer.compute_loss(student, dict(batch), return_outputs=return_outputs)
        loss = loss[0] if return_outputs else loss
        # As for two accumulated batches.
        (loss / 2).backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in student.parameters()])
        student.zero_grad()
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    (training, before), (returned, logits) = kept
    assert torch.equal(training, before) != overwritten and torch.equal(returned, logits)
    student.eval()
    trainer.compute_loss(student, dict(batch))
    assert torch.equal(*kept[-1])


def test_evaluation_is_the_cross_entropy_of_the_labels(tmp_path):
    student, teacher = make_student(), tiny_model()
    trainer = make_trainer(tmp_path, student, teacher)
    samples = Samples(8)
    trainer.args.per_device_eval_batch_size = 4
    found = trainer.evaluate(eval_dataset=samples)["eval_loss"]
    logits = student(samples.ids).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), samples.ids[:, 1:].flatten())
    assert np.isclose(found, expected.item(), rtol=1e-5)


def test_training_lowers_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, make_student(), tiny_model(), DistillConfig(alpha=1.0), max_steps=40)
    trainer.train()
    found = losses(trainer)
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    students = [make_student(), make_student()]
    curves = []
    for student, size, accumulated in zip(students, (8, 2), (1, 4), strict=True):
        trainer = make_trainer(
            tmp_path,
            student,
            tiny_model(),
            # Relative distances of parts of a batch have no mean that is the whole's.
            DistillConfig(hidden_weight=0.0),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
        )
        trainer.train()
        curves.append(losses(trainer))
    assert np.allclose(*curves, rtol=1e-5)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_teacher_is_unchanged(tmp_path):
    teacher = tiny_model().train()
    before = copy.deepcopy(teacher.state_dict())
    make_trainer(tmp_path, make_student(), teacher).train()
    assert not teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_training_resumes_from_the_last_complete_checkpoint(tmp_path, caplog):
    def trainer(folder, student):
        return make_trainer(
            folder, student, tiny_model(), max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2
        )

    whole = make_student()
    trainer(tmp_path / "whole", whole).train()
    assert last_complete_checkpoint(tmp_path / "whole").name == "checkpoint-6"
    (tmp_path / "whole" / "checkpoint-6" / COMPLETE).unlink()
    last = last_complete_checkpoint(tmp_path / "whole")
    assert last.name == "checkpoint-4"
    resumed = make_student(seed=2)
    with caplog.at_level("WARNING"):
        trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(last))
    # No warning about the guard tensor or the tied head.
    assert "keys in the checkpoint" not in caplog.text
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6), name
    assert last_complete_checkpoint(tmp_path / "nothing") is None


@pytest.fixture
def corpus(tmp_path):
    """Samples of a text, for cached teachers."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    return token_blocks(tmp_path / "text.txt", tokenizer, 16, cache=tmp_path / "cache")


def test_a_cache_of_the_whole_vocabulary_gives_the_losses_of_the_teacher(corpus, tmp_path):
    teacher = tiny_model()
    cached = cache_teacher(teacher, corpus, tmp_path / "teacher.safetensors", k=VOCABULARY)
    dataset = CachedTeacherDataset(corpus, cached)
    curves, students = [], [make_student(), make_student()]
    for student, samples, live in zip(students, (corpus, dataset), (teacher, None), strict=True):
        trainer = make_trainer(tmp_path, student, live, DistillConfig(hidden_weight=0.0), samples)
        trainer.train()
        curves.append(losses(trainer))
    # The stored log-probabilities have an error of up to 2.5e-4.
    assert np.allclose(*curves, rtol=1e-3)


def test_a_few_cached_tokens_lower_the_loss(corpus, tmp_path):
    dataset = CachedTeacherDataset(corpus, cache_teacher(tiny_model(), corpus, tmp_path / "teacher.safetensors", k=8))
    trainer = make_trainer(tmp_path, make_student(), None, DistillConfig(alpha=1.0), dataset, max_steps=40)
    trainer.train()
    found = losses(trainer)
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


def test_a_cache_of_another_temperature_or_vocabulary_is_refused(corpus, tmp_path):
    dataset = CachedTeacherDataset(corpus, cache_teacher(tiny_model(), corpus, tmp_path / "teacher.safetensors", k=8))
    with pytest.raises(ConfigError, match="temperature: expected 1, that of the cached teacher, got 3"):
        make_trainer(tmp_path, make_student(), None, DistillConfig(temperature=3.0), dataset)
    with pytest.raises(ConfigError, match="cached teacher's 104"):
        make_trainer(tmp_path, tiny_model(vocab_size=120), None, samples=dataset)


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmpfs):
    place = tmpfs("size=600k")
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(StorageError) as caught:
        make_trainer(place, make_student(), tiny_model(), **arguments).train()
    assert caught.value.errno == errno.ENOSPC and str(place) in str(caught.value.filename)
    assert last_complete_checkpoint(place).name == "checkpoint-1"


def test_labels_alone_need_no_teacher(tmp_path):
    trainer = make_trainer(tmp_path, make_student(), None, DistillConfig(alpha=0.0))
    trainer.train()
    assert len(losses(trainer)) == 4


def test_a_student_must_fit_its_teacher(tmp_path):
    with pytest.raises(ConfigError, match=r"104 tokens, the teacher's 50"):
        make_trainer(tmp_path, make_student(), tiny_model(vocab_size=50))
    with pytest.raises(ConfigError, match="expected 0 without a teacher"):
        make_trainer(tmp_path, make_student(), None, DistillConfig(hidden_weight=1.0))
    with pytest.raises(ConfigError, match="32 values, the teacher's 16"):
        make_trainer(tmp_path, make_student(), tiny_model(n_embd=16), DistillConfig(hidden_weight=1.0))
    with pytest.raises(ConfigError, match="name the pairs"):
        make_trainer(tmp_path, make_student(), tiny_model(n_layer=3), DistillConfig(hidden_weight=1.0))
    with pytest.raises(ConfigError, match=r"no pair \(1, 9\)"):
        make_trainer(tmp_path, make_student(), tiny_model(), DistillConfig(hidden_weight=1, hidden_layers=[(1, 9)]))
    trainer = make_trainer(tmp_path, make_student(), None)
    with pytest.raises(ConfigError, match="no cached teacher"):
        trainer.train()


def test_different_tokenizers_are_refused(tmp_path):
    one, other = save_tokenizer(tmp_path / "one"), save_tokenizer(tmp_path / "other")
    require_same_tokenizer(one, other)
    other.add_tokens(["new"])
    with pytest.raises(ConfigError, match="'new' is None for the student"):
        require_same_tokenizer(one, other)
    with pytest.raises(ConfigError, match="tokenizers differ"):
        DistillTrainer(
            make_student(),
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            teacher=tiny_model(),
            teacher_tokenizer=other,
            processing_class=one,
        )


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistillConfig, {"temperature": 0}, "temperature"),
        (DistillConfig, {"alpha": 1.5}, "alpha"),
        (DistillConfig, {"hidden_weight": -1}, "hidden_weight"),
        (DistillConfig, {"hidden_weight": float("nan")}, "hidden_weight"),
        (DistillConfig, {"hidden_kind": "huber"}, "hidden_kind"),
        (TrainingConfig, {"batch_size": 0}, "batch_size"),
        (TrainingConfig, {"seq_len": 2.5}, "seq_len"),
        (TrainingConfig, {"learning_rate": float("inf")}, "learning_rate"),
        (TrainingConfig, {"warmup_ratio": 2}, "warmup_ratio"),
        (TrainingConfig, {"bf16": True, "fp16": True}, "at most one"),
        (TrainingConfig, {"save_steps": 0}, "save_steps"),
        (TrainingConfig, {"save_steps": 2.5}, "save_steps"),
        (TrainingConfig, {"save_steps": True}, "save_steps"),
    ],
)
def test_settings_out_of_range(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)
