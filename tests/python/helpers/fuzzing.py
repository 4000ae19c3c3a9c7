"""Inputs that are nearly valid: random changes of valid files, of their bytes or of their JSON."""

import contextlib
import copy
import json
import random
import signal

from hypothesis import given, settings
from hypothesis import strategies as st
from tqcompressor.errors import TQError

# Seconds of CPU time, of all threads: a loaded machine does not change them.
HANG = 5
ODD = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        8,
        255,
        2**31,
        2**32 - 1,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**40,
        1e400,
        -1e400,
    ),
    *(
        0.5,
        1e-300,
        float("nan"),
        "",
        "x",
        "gpt2",
        "F32",
        "BF16",
        "I64",
        "\ud800",
        "a" * 300,
        [],
        [0],
        [[]],
        {},
        {"a": 1},
    ),
    *([2**62, 2**62], {"type": "x"}, {"rank": 1}, {"block": [2, 4], "rank": 1}),
]
TEXTS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"{}",
    b"[]",
    b"null",
    b'"',
    b"\\ud800",
    b"1e999",
    b"\n\n",
]


def changed_bytes(pick, content):
    """`content` with some bytes replaced, removed, repeated or put in."""
    content = bytearray(content)
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(len(content) + 1)
        end = min(len(content), at + pick.choice([1, 1, 2, 4, 8, 64]))
        kind = pick.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << pick.randrange(8)
        elif kind == 1:
            content[at:end] = pick.randbytes(end - at)
        elif kind == 2:
            del content[at:end]
        elif kind == 3:
            content[at:at] = pick.choice(TEXTS)
        elif kind == 4:
            content[at:at] = content[at:end] * pick.choice([1, 2, 50])
        else:
            del content[at if pick.random() < 0.3 else end :]
    return bytes(content)


def changed_value(pick, value):
    """A JSON value with some of its parts replaced, removed, renamed, repeated or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(pick.randint(1, 3)):
        parts = [value]
        # From the top, so that every depth is as likely.
        inner = value
        while isinstance(inner, dict | list) and inner and pick.random() < 0.8:
            inner = pick.choice(list(inner.values()) if isinstance(inner, dict) else inner)
            parts.append(inner)
        containers = [part for part in parts if isinstance(part, dict | list) and part]
        if not containers or pick.random() < 0.02:
            return copy.deepcopy(pick.choice(ODD))
        within = pick.choice(containers)
        key = pick.choice(list(within) if isinstance(within, dict) else range(len(within)))
        kind = pick.randrange(5)
        if kind == 0:
            del within[key]
        elif kind == 1 and isinstance(within, dict):
            within[pick.choice([*within, "x", "\ud800"])] = within.pop(key)
        elif kind == 2:
            within[key] = copy.deepcopy(pick.choice(parts))
        else:
            within[key] = copy.deepcopy(pick.choice(ODD))
    return value


def changed_json(pick, content):
    """The bytes of a JSON text, changed as a value or as bytes."""
    if pick.random() < 0.3:
        return changed_bytes(pick, content)
    return json.dumps(changed_value(pick, json.loads(content))).encode()


def changed_tensors(pick, content):
    """A safetensors file, changed in its header or anywhere."""
    end = 8 + int.from_bytes(content[:8], "little")
    if pick.random() < 0.3:
        return changed_bytes(pick, content)
    header = changed_json(pick, content[8:end])
    length = (
        len(header) if pick.random() < 0.9 else pick.choice([0, 1, len(header) - 1, len(header) + 1, 2**32, 2**64 - 1])
    )
    return max(length, 0).to_bytes(8, "little") + header + content[end:]


def noise(pick, content):
    """Random bytes, of a length that has nothing to do with the content."""
    return pick.randbytes(pick.choice([0, 1, 7, 8, 9, 100, 1000]))


@contextlib.contextmanager
def no_hang():
    """Raises TimeoutError in a block that takes too long."""

    def stop(number, frame):
        raise TimeoutError(f"{HANG} seconds of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(path, change, read, inputs):
    """Writes `inputs` changes of the file at `path` to it, and checks that `read` takes or refuses each.

    Returns how many were taken.
    """
    valid = path.read_bytes()
    taken = 0

    @settings(max_examples=inputs, database=None)
    @given(st.integers(0, 2**64 - 1))
    def check(seed):
        nonlocal taken
        pick = random.Random(seed)
        # Written in place: replacing a file that is mapped would leave the old one mapped.
        path.write_bytes((noise if pick.random() < 0.05 else change)(pick, valid))
        with no_hang(), contextlib.suppress(TQError):
            read()
            taken += 1

    try:
        check()
    finally:
        path.write_bytes(valid)
    return taken
