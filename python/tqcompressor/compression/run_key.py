"""The facts that the result of a run on disk depends on: a resumed run must have those of the one that was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import _core
from ..calibration.calibration import Calibration
from ..data.text import TextOption, open_texts, utf8

_DIGITS = 16


def run_key(checkpoint: _core.Checkpoint, source: str, arguments: Mapping[str, Any]) -> str:
    """The facts of a run as a JSON object: the version, the files of the source, and the arguments, by their names.

    A calibration and a text count by their contents.
    """
    facts = {"tqcompressor": _core.__version__, **_files(checkpoint, source), **arguments}
    known, text = facts.get("calibration"), facts.get("text")
    if known is not None:
        facts["calibration"] = calibration_digest(known)
    if text is not None:
        facts["text"] = text_digest(text)
    # Numbers of numpy and the like become text.
    return json.dumps({name: value for name, value in facts.items() if value is not None}, default=str)


def calibration_digest(calibration: Calibration) -> str:
    """Hexadecimal digits that are equal for equal calibrations."""
    digest = _digest()
    digest.update(f"{calibration.tokens} {calibration.sensitivity}\n".encode())
    for name, moment in calibration.moments.items():
        digest.update(f"{name} {moment.shape}\n".encode())
        digest.update(moment.data)
    return digest.hexdigest()


def text_digest(text: TextOption) -> str:
    """Hexadecimal digits that are equal for equal texts, in whichever files; raises as `open_texts`."""
    digest = _digest()
    for parts in open_texts(text):
        for part in parts:
            digest.update(utf8(part))
        # No UTF-8 has this byte, so that two texts differ from one.
        digest.update(b"\xff")
    return digest.hexdigest()


def _files(checkpoint: _core.Checkpoint, source: str) -> dict[str, str]:
    """The identity of each file: size, time of change and header of weights; the contents of the config."""
    facts = {"source config.json": _digest(Path(source, "config.json").read_bytes()).hexdigest()}
    for path in checkpoint.weight_files:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = _digest(file.read(length)).hexdigest()
            status = os.fstat(file.fileno())
        facts[f"source {Path(path).name}"] = f"{status.st_size} bytes of {status.st_mtime_ns}, header {header}"
    return facts


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=_DIGITS // 2)
