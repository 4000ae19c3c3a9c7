"""Python and Rust read the JSON of a config alike: both accept it, or both refuse it."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tqcompressor import TQConfig, _core
from tqcompressor.errors import ConfigError

NAMES = [f"h.{number}" for number in range(6)]

# Values of the wrong kind for a key.
odd = st.sampled_from([None, True, False, 0, -1, 1.0, 2**63, 2**64 - 1, 2**64, "", "rows", "1", [], [1], [1, 2, 3], {}])
count = st.integers(1, 4)
permute = st.sampled_from(["none", "rows", "columns", "both"])


def fields(required, optional=None):
    return st.fixed_dictionaries(required, optional=optional or {})


kronecker = fields({"block": st.tuples(count, count).map(list), "rank": count}, {"permute": permute})
low_rank = fields({"rank": count})
mixed = fields({"terms": st.lists(kronecker | low_rank, min_size=2, max_size=3)})
spec = kronecker | low_rank | mixed
_floating = fields(
    {"specs": st.dictionaries(st.sampled_from(NAMES), spec, min_size=1, max_size=3)},
    {
        "quant_method": st.just("tqcompressor"),
        "format_version": st.sampled_from([1, 2]),
        "effort": st.sampled_from(["fast", "balanced", "best"]),
        "seed": st.integers(0, 2**64 - 1),
    },
)
_int8 = fields(
    {"specs": st.dictionaries(st.sampled_from(NAMES), spec, max_size=2), "dtype": st.just("int8")},
    {"dense": st.lists(st.sampled_from(NAMES), max_size=2), "format_version": st.just(4)},
)
config = _floating | _int8


def places(value, path=()):
    """The paths of everything within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, change):
    if not path:
        return change(value)
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(value[key], rest, change)
    return copy


@st.composite
def broken(draw):
    """A config with a value replaced, a key left out, or a key too many."""
    value = draw(config)
    path = draw(st.sampled_from(list(places(value))))
    key = draw(st.sampled_from(["", "block", "rank", "permute", "terms", "bits", "h.0"]))
    other = draw(odd | spec)

    def change(inner):
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove" and isinstance(inner, dict) and inner:
            gone = draw(st.sampled_from(list(inner)))
            return {name: part for name, part in inner.items() if name != gone}
        if kind == "add" and isinstance(inner, dict):
            return {**inner, key: other}
        return other

    return changed(value, path, change)


def accepted_by_python(text):
    try:
        TQConfig.from_json(text)
    except ConfigError:
        return False
    return True


def accepted_by_rust(text):
    try:
        _core.read_config(text)
    except ConfigError:
        return False
    return True


@given(config)
def test_what_is_right_is_accepted_by_both(value):
    text = json.dumps(value)
    read, by_rust = TQConfig.from_json(text), _core.read_config(text)
    # In the same order, too: the first pattern that matches decides.
    assert list(read.specs.items()) == by_rust[0] and (read.effort, read.seed) == by_rust[1:3]
    assert by_rust[3] == (None if read.dtype is None else list(read.dense or ()))


@given(broken())
@example({"specs": {"h.0": [[1, 4], 1, "both"]}})
@example(["tqcompressor", 1, {"h.0": {"rank": 1}}, "fast", 0])
@example({"specs": {"h.0": {"rank": 1}}, "effort": None})
@example({"specs": {"h.0": {"rank": 2**64}}})
@example({"specs": {"h.0": {"rank": 0}}})
@example({"specs": {"": {"rank": 1}}})
@example({"specs": {"h.0\ud800": {"rank": 1}}})
def test_what_is_wrong_is_refused_by_both_or_by_none(value):
    text = json.dumps(value)
    assert accepted_by_python(text) == accepted_by_rust(text), text


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "NaN", '{"specs": NaN}', "[" * 200_000, "\ufeff{}"])
def test_what_is_no_config_at_all(text):
    assert not accepted_by_python(text) and not accepted_by_rust(text)
