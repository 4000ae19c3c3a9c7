"""The package imports and works without what Windows lacks: POSIX-only modules, functions and constants."""

from helpers.corpora import TINY
from helpers.processes import run_script

IMPORTS = """
    from helpers.windows import take_away_modules

    take_away_modules()
    import tqcompressor

    print(tqcompressor.RECIPES["tq-81m"])
"""
# numpy for this system is imported before: it calls `os.uname`.
USES = """
    import os, sys, warnings
    from pathlib import Path
    import numpy
    from helpers.windows import take_away_functions, take_away_modules

    take_away_modules()
    take_away_functions()
    # Without fcntl, filelock says that its locks are of another kind.
    warnings.simplefilter("ignore")
    import tqcompressor
    from tqcompressor.cli.main import main

    source, folder = sys.argv[2], Path(sys.argv[1])
    out, text = folder / "out", folder / "text.txt"
    text.write_text(Path(source, "evaluation.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    options = dict(text=text, num_samples=2, seq_len=16, engine="native", effort="fast", budget=0.8, resume=True)

    kept = folder / ".out.tqcompressor-resume"

    def stop(done, total):
        if any(kept.glob("fit-*")):
            raise KeyboardInterrupt

    try:
        tqcompressor.compress_checkpoint(source, out, progress=stop, **options)
    except KeyboardInterrupt:
        print("stopped")
    assert not out.exists() and any(kept.glob("fit-*"))
    tqcompressor.compress_checkpoint(source, out, **options)
    assert not kept.exists()
    options.update(budget=0.7, overwrite=True, resume=False, save_calibration=folder / "moments")
    tqcompressor.compress_checkpoint(source, out, **options)
    assert tqcompressor.Calibration.load(folder / "moments").tokens == 32
    model = tqcompressor.NativeModel.from_pretrained(out)
    assert model.generate("The", max_new_tokens=2) and model.score(text).text.perplexity > 1
    tqcompressor.expand_checkpoint(out, folder / "dense")
    assert main(["evaluate", str(out), "--engine", "native", "--text", str(text)]) == 0
    assert main(["inspect", str(out)]) == 0
    print(sorted(os.listdir(folder)))
"""


def test_it_imports_without_posix_modules():
    assert "wte" in run_script(IMPORTS)


def test_it_compresses_resumes_and_evaluates_without_what_windows_lacks(tmp_path):
    printed = run_script(USES, tmp_path, TINY)
    # No lock, no half result and no work is left.
    assert "stopped" in printed.splitlines()
    assert printed.splitlines()[-1] == "['dense', 'moments', 'out', 'text.txt']"
