"""Checks of numeric arguments."""

import re

import numpy as np
import pytest
from tqcompressor.errors import ConfigError
from tqcompressor.utils import validate


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(7)])
def test_integers_of_any_kind_are_taken(value):
    found = validate.integer("rank", value, 1, 7)
    assert found == value and type(found) is int


@pytest.mark.parametrize("value", [0, -1, -(2**70), True, False, 1.0, "1", None, np.float32(1), np.array([1, 2])])
def test_what_is_out_of_range_or_no_integer_is_refused(value):
    with pytest.raises(ConfigError, match=re.escape(f"rank: expected an integer from 1 to 7, got {value!r}")):
        validate.integer("rank", value, 1, 7)
    with pytest.raises(ConfigError, match=re.escape(f"rank: expected an integer from 1 up, got {value!r}")):
        validate.integer("rank", value, 1)
    for large in (8, 2**70):
        with pytest.raises(ConfigError, match=f"rank: expected an integer from 1 to 7, got {large}"):
            validate.integer("rank", large, 1, 7)


def test_seeds_have_64_bits():
    assert validate.seed(0) == 0 and validate.seed(2**64 - 1) == 2**64 - 1
    for value in (-1, 2**64, 1.0, True, None):
        with pytest.raises(ConfigError, match="seed: expected an integer from 0 to 18446744073709551615, got"):
            validate.seed(value)


def test_threads_are_at_least_one_or_all():
    assert validate.threads(None) is None and validate.threads(3) == 3
    for value in (0, -1, 1.0, True, False, "2", 2**16):
        with pytest.raises(ConfigError, match="threads: expected an integer from 1 to 65535, got"):
            validate.threads(value)
