"""The licences of the crates in a wheel: those of the list alone, and the text of each beside the wheel."""

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = (ROOT / ".ci" / "third-party-licences.txt").read_text(encoding="utf-8")
# `name version: licence, place`, up to the first empty line.
LISTED = re.findall(r"^(\S+ \S+): (.+), \S+(?: repository)?$", TEXTS.partition("=" * 80)[0], re.MULTILINE)


@pytest.fixture(scope="module")
def licences():
    loader = SourceFileLoader("licences", str(ROOT / ".ci" / "licences"))
    module = module_from_spec(spec_from_loader("licences", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("MIT", True),
        ("MIT OR Apache-2.0", True),
        ("MIT/Apache-2.0", True),
        ("GPL-3.0 OR MIT", True),
        ("(GPL-3.0 OR MIT) AND Unicode-3.0", True),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", True),
        ("GPL-3.0", False),
        ("MIT AND GPL-3.0", False),
        ("MIT AND (GPL-3.0 OR LGPL-2.1)", False),
        ("GPL-2.0 WITH Classpath-exception-2.0", False),
        ("None", False),
    ],
)
def test_expressions(licences, expression, fine):
    assert licences.allowed(expression, {"MIT", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"}) == fine


def crate(folder, name, licence, **texts):
    (folder / name).mkdir()
    for file, text in texts.items():
        (folder / name / file.replace("_", "-")).write_text(text, encoding="utf-8")
    manifest = str(folder / name / "Cargo.toml")
    return {"name": name, "version": "1.0.0", "license": licence, "repository": None, "manifest_path": manifest}


def test_a_licence_that_is_not_listed_stops_the_check(licences, tmp_path, monkeypatch):
    found = {"a": crate(tmp_path, "a", "MIT"), "b": crate(tmp_path, "b", "SSPL-1.0"), "c": crate(tmp_path, "c", None)}
    monkeypatch.setattr(licences, "bundled", lambda: found)
    with pytest.raises(SystemExit) as stopped:
        licences.main()
    message = str(stopped.value)
    assert "b 1.0.0: SSPL-1.0" in message and "c 1.0.0: None" in message and "a 1.0.0" not in message


def test_each_text_stands_once_with_its_crates(licences, tmp_path):
    both = {"LICENSE_APACHE": "Apache\nterms", "LICENSE_MIT": "MIT terms of A"}
    crates = [
        crate(tmp_path, "a", "MIT OR Apache-2.0", **both),
        crate(tmp_path, "b", "Apache-2.0", LICENSE="Apache  terms", NOTICE="by B"),
        crate(tmp_path, "c", "MIT AND Apache-2.0", **both),
        crate(tmp_path, "d", "MIT"),
    ]
    text = licences.document(crates)
    assert "d 1.0.0" in text.partition("Without a text")[2].partition("\n")[0]
    parts = [part.strip() for part in text.split("=" * 80)[1:]]
    assert dict(zip(parts[::2], parts[1::2], strict=True)) == {
        "a 1.0.0, b 1.0.0, c 1.0.0": "Apache\nterms",
        "b 1.0.0": "by B",
        "c 1.0.0": "MIT terms of A",
    }


def test_the_file_lists_crates_of_the_lock_file_under_allowed_licences(licences):
    lock = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    locked = {f"{name} {version}" for name, version in re.findall(r'name = "(.+)"\nversion = "(.+)"', lock)}
    names = [name for name, _ in LISTED]
    assert len(names) > 100 and {"faer", "tokenizers", "winapi-util"} <= {name.partition(" ")[0] for name in names}
    assert set(names) <= locked, "run `python .ci/licences --write`"
    allow = set(licences.listed("allow"))
    assert [name for name, licence in LISTED if not licences.allowed(licence, allow)] == []
