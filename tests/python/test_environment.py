"""Every environment variable that the code reads stands in one table of CONTRIBUTING.md, and no other does."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION = "## What can be set from outside"
OWN = re.compile(r"TQCOMPRESSOR_[A-Z0-9_]+")
# How Python and Rust read a variable by its name.
READ = re.compile(r"""(?:environ(?:\.get|\.pop|\.setdefault)?[([]|getenv\(|env::var(?:_os)?\()\s*\\?["']([A-Z0-9_]+)""")
# Read to be restored or handed on as they are.
UNCHANGED = {"PYTHONPATH", "TOKENIZERS_PARALLELISM"}


def documented():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index(SECTION) :].partition("\n## ")[0]
    return {name for row in re.findall(r"^\|([^|]*)\|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def sources():
    for folder, ending in [("python/tqcompressor", "py"), ("src", "rs"), ("notebooks", "ipynb")]:
        for path in (ROOT / folder).rglob(f"*.{ending}"):
            yield path.read_text(encoding="utf-8")


def names_in(texts):
    return {name for text in texts for pattern in (OWN, READ) for name in pattern.findall(text)}


def test_every_variable_is_documented_and_no_other():
    found = names_in(sources()) - UNCHANGED
    assert {"TQCOMPRESSOR_CACHE", "TQCOMPRESSOR_NOTEBOOK_TOKENS", "XDG_CACHE_HOME"} <= found
    # Read by Python's tempfile.
    assert documented() == found | {"TMPDIR", "TEMP"}


def test_variables_are_found_however_they_are_read():
    texts = [
        'os.environ["ONE"] + os.environ.get("TWO", "")',
        "getenv('THREE')",
        'std::env::var("FOUR").ok().or(env::var_os("FIVE"))',
        'environ.get(\\"SIX\\") or f"{prefix}TQCOMPRESSOR_SEVEN"',
    ]
    assert names_in(texts) == {"ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "TQCOMPRESSOR_SEVEN"}
