"""Numbers of bytes in human-readable form."""

import re

import pytest
from tqcompressor.errors import ConfigError
from tqcompressor.utils.sizes import byte_count, size_in_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("7b", 7),
        ("7 B", 7),
        (" 1.5kB ", 1500),
        ("2KiB", 2048),
        ("500MB", 500 * 10**6),
        ("0.5 mib", 1 << 19),
        ("5GB", 5 * 10**9),
        ("5gib", 5 << 30),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text, expected):
    assert size_in_bytes(text) == byte_count("room", text) == expected


@pytest.mark.parametrize("size", ["", "MB", "5 XB", "5k", "5ib", "-5MB", "65%", "1e9", "five", True, 1.5e30, None])
def test_what_is_no_size_is_refused_by_name(size):
    message = f'room: expected bytes, or a size like "5GB" or "500MiB", got {size!r}'
    with pytest.raises(ConfigError, match=re.escape(message)):
        byte_count("room", size)


@pytest.mark.parametrize("size", [0, "0.4b", 2**63, "9000000TiB"])
def test_sizes_out_of_range_are_refused_by_name(size):
    message = f"room: expected a number of bytes from 1 to 2⁶³ − 1, got {size!r}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        byte_count("room", size)
