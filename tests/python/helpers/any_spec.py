"""Lets live models be compressed by specs of every kind where the extension module knows Kronecker sums only.

Terms of low rank and mixed sums are then random: what is tested with them is what becomes of terms, not their quality.
"""

import json
from fnmatch import fnmatchcase

import numpy as np
from tqcompressor import _core, in_place
from tqcompressor.errors import ShapeError
from tqcompressor.specs import KroneckerSpec, spec_from_dict

from .terms import dense, random_terms

_PLACEHOLDER = {"block": [1, 1], "rank": 1, "permute": "none"}


def allow_every_spec(monkeypatch):
    """Replaces the planning and the fitting by ones that take any spec; nothing where the module does so itself."""
    if hasattr(_core, "fit_many"):
        return
    real_plan, real_fit = _core.plan, in_place._fit

    def plan(tensors, tied, text):
        config = json.loads(text)
        specs = config["specs"]
        placeholders = dict.fromkeys(specs, _PLACEHOLDER)
        planned = json.loads(
            real_plan(tensors, tied, json.dumps({**config, "specs": placeholders, "format_version": 1}))
        )
        for entry in planned["matrices"]:
            names = (entry["name"], entry["module"], f"transformer.{entry['name']}")
            spec = next(spec for pattern, spec in specs.items() if any(fnmatchcase(name, pattern) for name in names))
            for key in _PLACEHOLDER:
                del entry[key]
            entry |= spec
            planned["parameters_after"] -= entry["parameters_after"]
            try:
                entry["parameters_after"] = spec_from_dict(spec).parameters(*entry["shape"])
            except ShapeError as error:
                raise ShapeError(f"{entry['name']}: {error}") from None
            planned["parameters_after"] += entry["parameters_after"]
        return json.dumps(planned)

    def fit(matrices, specs, effort, seed, threads, progress):
        rng, results = np.random.default_rng(seed), []
        for matrix, (name, spec) in zip(matrices, specs.items(), strict=True):
            if isinstance(spec, KroneckerSpec):
                results += real_fit([matrix], {name: spec}, effort, seed, threads, progress)
                continue
            terms = random_terms(spec, *matrix.shape, rng)
            # About as large as what they stand for.
            scale = np.float32(np.linalg.norm(matrix) / np.linalg.norm(dense(terms, *matrix.shape)))
            scaled = []
            for kind, *arrays in terms:
                known = 1 if kind == "low_rank" and matrix.shape[0] <= matrix.shape[1] else 0
                arrays[known] = arrays[known] * scale
                scaled.append((kind, *arrays))
            error = matrix - dense(scaled, *matrix.shape)
            results.append((scaled, float(np.square(error).sum() / np.square(matrix).sum()), 0.0))
        return results

    monkeypatch.setattr(_core, "plan", plan)
    monkeypatch.setattr(in_place, "_fit", fit)
