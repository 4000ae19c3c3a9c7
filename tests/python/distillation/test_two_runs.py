"""Two runs into one destination: the second is refused at once, and changes nothing."""

import shutil
import threading
from pathlib import Path

import pytest
from helpers.checkpoints import Checkpoint, config
from helpers.corpora import HELD_OUT
from helpers.distillation import RECIPE, letters
from helpers.models import tiny_model
from helpers.tokenizer import save_tokenizer
from tqcompressor import cache_teacher, compress_checkpoint, distill, token_blocks
from tqcompressor.cli import main as cli
from tqcompressor.distillation.config import TrainingConfig
from tqcompressor.errors import DestinationError, TextError
from tqcompressor.utils import atomic_io
from tqcompressor.utils.atomic_io import sole_run


@pytest.fixture
def teacher(tmp_path):
    save_tokenizer(tmp_path / "teacher")
    tiny_model().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(letters(6000), encoding="utf-8")
    return tmp_path / "teacher"


def run(teacher, out, **changes):
    options = {"recipe": RECIPE.stages[2].config, "tokens": 128, "cache": teacher.parent / "cache", "device": "cpu"}
    training = TrainingConfig(batch_size=4)
    return distill(teacher, text=teacher.parent / "text.txt", out=out, training=training, **{**options, **changes})


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["out", "new/parents/out", "link/out"])
@pytest.mark.parametrize("command", ["distill", "--resume", "compress", "--overwrite", "calibrate"])
def test_the_second_run_is_refused(teacher, tmp_path, command, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    source, out = Checkpoint().write(tmp_path / "in"), tmp_path / name
    arguments = ["calibrate", str(teacher), "--text", str(tmp_path / "text.txt"), "--out", str(out), "--debug"]
    commands = {
        "distill": lambda: run(teacher, out),
        "--resume": lambda: run(teacher, out, resume=True),
        "compress": lambda: compress_checkpoint(source, out, config({"wte": ((1, 4), 1, "columns")})),
        "--overwrite": lambda: compress_checkpoint(
            source, out, config({"wte": ((1, 4), 1, "columns")}), overwrite=True
        ),
        "calibrate": lambda: cli.main(arguments),
    }
    # The first run was given the other name of the folder.
    with sole_run(tmp_path / name.replace("link", "real")):
        before = listing(tmp_path)
        with pytest.raises(DestinationError, match="another run of tqcompressor is writing it"):
            commands[command]()
        assert listing(tmp_path) == before


def test_a_live_distillation_holds_the_lock(teacher, tmp_path):
    """From the first check to the report; a run that ends, or fails, leaves no lock and no folder."""
    seen = []

    def watch(done, total):
        with pytest.raises(DestinationError, match="another run"), sole_run(tmp_path / "a" / "out"):
            pass
        seen.append(done)

    with pytest.raises(TextError):
        run(teacher, tmp_path / "a" / "out", tokens=10**9)
    assert not (tmp_path / "a").exists()
    run(teacher, tmp_path / "a" / "out", progress=lambda done, total: done or watch(done, total))
    assert seen and [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_where_the_system_admits_no_lock_there_is_none(tmp_path, monkeypatch):
    """A folder that is mounted into a read-only one, and a file system without locks."""
    import filelock

    def refuse(self):
        raise OSError(atomic_io.errno.EROFS, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with sole_run(tmp_path / "out"):
        assert listing(tmp_path) == []


def test_resume_needs_a_run(teacher, tmp_path):
    """A folder of someone else is not distilled into, whatever it is called."""
    out = tmp_path / "project"
    (out / "final").mkdir(parents=True)
    (out / "final" / "figure.png").write_bytes(b"x")
    (out / "README.md").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(DestinationError, match=r"holds 'README.md' and no training_state\.json: it has no run"):
        run(teacher, out, resume=True)
    assert listing(tmp_path) == before and (out / "README.md").read_text() == "mine"
    with pytest.raises(DestinationError, match="not a folder"):
        run(teacher, out / "README.md", resume=True)
    # What a run leaves that was killed before it had written anything.
    shutil.rmtree(out)
    out.mkdir()
    for name in (".training_state.json.partial", ".training_state.json.lock"):
        (out / name).touch()
    report = run(teacher, out, resume=True)
    assert report.tokens == 128 and [path.name for path in Path(out).glob(".*")] == []


@pytest.mark.parametrize("what", ["cached teacher", "token cache"])
def test_writers_of_a_shared_cache_wait_and_read_it(teacher, tmp_path, tokenizer, what):
    """A cache is for all who need it: the second writer waits, and finds the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, own = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    blocks = token_blocks(tmp_path / "text.txt", own, 32, cache=tmp_path / "cache", tokens=320)
    calls, found = [], []

    def work():
        if what == "cached teacher":
            cached = cache_teacher(model, blocks, tmp_path / "t.safetensors", k=4, progress=lambda *_: calls.append(1))
            found.append(cached[0]["teacher_tokens"].tolist())
        else:
            text = token_blocks(HELD_OUT, tokenizer, 64, cache=tmp_path / "other", progress=lambda *_: calls.append(1))
            found.append(text[0]["input_ids"].tolist())

    work()
    once = len(calls)
    del calls[:]
    for file in (tmp_path / "t.safetensors", *(tmp_path / "other").glob("*")):
        file.unlink(missing_ok=True)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(calls) == once and len(found) == 4 and all(one == found[0] for one in found)
