"""Results are the same bytes on every instruction set of the processor, and a name that it lacks is refused."""

import json

import pytest
from helpers.corpora import TINY
from helpers.processes import run_script
from tqcompressor import _core

VARIABLE = "TQCOMPRESSOR_ISA"
# Digests of what a process of its own computes. faer, which chooses by itself, multiplies alike in all of them.
WORK = """
    import hashlib, json, sys
    from pathlib import Path
    import numpy as np
    from tqcompressor import NativeModel, _core, compress_checkpoint, find_permutation, KroneckerSpec
    from tqcompressor.losses import distillation_loss, hidden_state_loss

    def digest(*arrays):
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    source, out = map(Path, sys.argv[1:])
    random = np.random.default_rng(0)
    student, teacher = (9 * random.standard_normal((2, 6, 2311))).astype(np.float32)
    found = {"instruction set": _core.instruction_set()}
    for dtype in ("float32", "float16"):
        given = [logits.astype(dtype) for logits in (student, teacher)]
        found[f"logits' loss, {dtype}"] = digest(*distillation_loss(*given, np.arange(6)))
        found[f"hidden states' loss, {dtype}"] = digest(*hidden_state_loss(*given))
    searched = find_permutation(student[:, :768].reshape(48, 96), KroneckerSpec((2, 4), 2), effort="balanced")
    found["permutation"] = digest(*searched[:2])
    specs = {"h.0.mlp.c_fc": {"block": [2, 4], "rank": 2}, "h.1.attn.c_proj": {"rank": 16}}
    compress_checkpoint(source, out, {"specs": specs}, effort="fast")
    found["checkpoint"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    for dtype in (None, "int8"):
        model = NativeModel.from_pretrained(out, dtype=dtype)
        tokens = model.generate_tokens([[5, 6, 7]], max_new_tokens=12)
        found[f"tokens, {dtype or 'as stored'}"] = digest(tokens)
        found[f"logits, {dtype or 'as stored'}"] = digest(model.logits([[5, 6, 7]]), model.logits([[5]]))
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def uncapped(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        return work(tmp_path_factory.mktemp("uncapped"))


def work(folder):
    return json.loads(run_script(WORK, TINY, folder / "out").splitlines()[-1])


def test_the_best_one_is_used_without_the_variable(uncapped):
    assert uncapped["instruction set"] == _core.instruction_sets()[-1]


@pytest.mark.parametrize("name", _core.instruction_sets()[:-1])
def test_results_are_the_same_bytes(uncapped, monkeypatch, tmp_path, name):
    monkeypatch.setenv(VARIABLE, name)
    assert work(tmp_path) == {**uncapped, "instruction set": name}


@pytest.mark.parametrize("name", ["avx3", "AVX2", "sse2", "none"])
def test_a_name_that_the_processor_lacks_is_refused_by_the_first_job(monkeypatch, tmp_path, name):
    monkeypatch.setenv(VARIABLE, name)
    script = """
        import sys
        import numpy as np, tqcompressor
        from tqcompressor import _core
        from tqcompressor.cli.main import main
        from tqcompressor.errors import ConfigError
        for job in (
            _core.instruction_set,
            lambda: tqcompressor.losses.distillation_loss(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)),
            lambda: tqcompressor.NativeModel.from_pretrained(sys.argv[1]),
            lambda: tqcompressor.decompose(np.eye(4, dtype=np.float32), tqcompressor.KroneckerSpec((2, 2), 1)),
        ):
            try:
                job()
            except ConfigError as error:
                print(error)
        print("status", main(["compress", sys.argv[1], "--recipe", "tq-81m", "--out", sys.argv[2]]))
    """
    printed = run_script(script, TINY, tmp_path / "out")
    names = ", ".join(_core.instruction_sets())
    expected = f'{VARIABLE}: expected one of {names} (what this processor has), got "{name}"'
    assert printed.count(expected) == 5
    assert "error: " + expected in printed
    assert "status 2" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_an_empty_value_caps_nothing(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    printed = run_script("from tqcompressor import _core; print(_core.instruction_set())")
    assert printed.strip() == _core.instruction_sets()[-1]
