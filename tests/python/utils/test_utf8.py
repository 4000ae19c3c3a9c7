"""Text and JSON that is not UTF-8 is named."""

import pytest
from tqcompressor._core import foreign_text
from tqcompressor.utils.utf8 import decoded, parsed, read_json

TEXT = "The old man, he said, looked at it. Caf\u00e9, na\u00efve.\n" * 3
CYRILLIC, JAPANESE = "\u0432\u0435\u0440\u0441\u0438\u044f", "\u65e5\u672c" * 100
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXT.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "UTF-16 text"),
        (TEXT.encode("utf-16-be"), "UTF-16 text"),
        (b"{\0", "UTF-16 text"),
        (POINTER, "Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        (TEXT.encode("latin-1"), "not UTF-8 at byte 39"),
        (b"ab\xff", "not UTF-8 at byte 2"),
    ],
)
def test_bytes_that_are_something_else_are_named(data, words):
    with pytest.raises(ValueError, match=words):
        decoded(data)


@pytest.mark.parametrize("text", ["", "a", TEXT, "one\0zero", CYRILLIC, JAPANESE, "version https"])
def test_text_in_utf8_is_text(text):
    assert decoded(text.encode()) == text
    assert decoded(b"\xef\xbb\xbf" + text.encode()) == text
    assert foreign_text(text.encode()) is None


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "{'a': 1}", "1" * 10_000], ids=range(5))
def test_what_is_not_json_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="not JSON"):
        parsed(text)
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match="not JSON"):
        read_json(tmp_path / "file")


def test_json_has_no_byte_order_mark(tmp_path):
    (tmp_path / "file").write_text("\ufeff{}", encoding="utf-8")
    with pytest.raises(ValueError, match="byte order mark"):
        read_json(tmp_path / "file")
