"""Fits sums of several kinds term by term, each to what the earlier ones left, where the extension module does not.

What is tested with them is what becomes of terms, not how near they come.
"""

import json

import numpy as np
from tqcompressor import _core

from .terms import dense


def allow_mixed_sums(monkeypatch):
    """Replaces `fit_many` by one that takes sums of several kinds, too; nothing where it does so itself."""
    arguments = (["w"], [json.dumps({"terms": [{"rank": 1}, {"rank": 1}]})], [(None, None)], "fast", 0, 1, None)
    try:
        _core.fit_many([np.eye(4, dtype=np.float32)], *arguments)
        return
    except ValueError:
        real = _core.fit_many

    def fit_many(matrices, names, specs, moments, *options):
        results = []
        for matrix, name, spec, moment in zip(matrices, names, specs, moments, strict=True):
            terms = []
            for each in json.loads(spec).get("terms", [json.loads(spec)]):
                left = matrix - dense(terms, *matrix.shape) if terms else matrix
                (((term,), lost_energy, seconds),) = real([left], [name], [json.dumps(each)], [moment], *options)
                terms.append(term)
            if len(terms) > 1:
                error = matrix - dense(terms, *matrix.shape)
                lost_energy = float(np.square(error).sum() / np.square(matrix).sum())
            results.append((terms, lost_energy, seconds))
        return results

    monkeypatch.setattr(_core, "fit_many", fit_many)
