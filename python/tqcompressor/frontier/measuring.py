"""Quality and speed of a checkpoint on a held-out text, by the native runtime or by torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .. import _core
from ..errors import MissingDependencyError
from ..utils.progress import ProgressOption
from .results import Measure

# Speed is the best of several runs, which end after so many or so long.
_RUNS, _SECONDS = 3, 2.0
# Tokens that are read before, and that are written.
_PROMPT, _WRITTEN = 16, 64


@dataclass(frozen=True)
class Measured:
    """What is measured of a checkpoint."""

    quality: float
    tokens_per_second: float
    score: Mapping[str, Any]


@dataclass(frozen=True)
class Measuring:
    """How the checkpoints of a sweep are measured: `measure` takes the folder of one."""

    measure: Measure
    engine: str
    text: str | PathLike[str]
    context: int | None
    stride: int | None
    device: str
    threads: int | None
    source: str
    """The original, which the embeddings of others are compared with."""

    @classmethod
    def of(cls, source: str, config: Mapping[str, Any], engine: str, **options: Any) -> Measuring:
        """For the original in `source`: with "auto", natively where the runtime computes its family.

        Raises:
            MissingDependencyError: It needs torch and transformers, which are not installed.
        """
        architecture = str((config.get("architectures") or [""])[0])
        known = architecture.endswith(("LMHeadModel", "Model", "ForCausalLM"))
        known = known and _core.native_refusal(json.dumps(config)) is None
        # What it does not compute, it refuses.
        if engine == "native" or (engine == "auto" and known and options["device"] == "cpu"):
            return cls("perplexity", "native", source=source, **options)
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                f"a {config.get('model_type')} is measured by torch, which needs {error.name}: "
                'pip install "tqcompressor[hf]"'
            ) from error
        from ..verify.subject import predicts_next_token

        measure: Measure = "perplexity" if predicts_next_token(source) else "cosine"
        return cls(measure, "torch", source=source, **options)

    def __call__(self, folder: str, progress: ProgressOption = None) -> Measured:
        """Measures the checkpoint in a folder.

        Raises:
            TextError: The text is empty, or too short to be scored.
            ConfigError: `context` or `stride` is out of its range.
        """
        if self.engine == "native":
            return self._native(folder, progress)
        return self._perplexity(folder, progress) if self.measure == "perplexity" else self._cosine(folder, progress)

    def _native(self, folder: str, progress: ProgressOption) -> Measured:
        from ..native.model import NativeModel

        model = NativeModel.from_pretrained(folder, threads=self.threads, progress=progress)
        found = model.perplexity(self.text, context=self.context, stride=self.stride, progress=progress)
        prompt, length = _lengths(model.context)
        ids = [1] * prompt

        def write() -> int:
            # No token ends it, so that every model writes as many.
            return len(model.generate_tokens([ids], max_new_tokens=length, eos_token_id=())[0])

        return Measured(found.perplexity, _speed(write), found.to_dict())

    def _perplexity(self, folder: str, progress: ProgressOption) -> Measured:
        import torch
        from transformers import AutoTokenizer

        from ..evaluate.scoring import perplexity
        from ..utils.torch_utils import evaluating

        tokenizer, model = AutoTokenizer.from_pretrained(self.source), self._loaded(folder)
        options: dict[str, Any] = {"context": self.context, "stride": self.stride, "progress": progress}
        found = perplexity(model, tokenizer, self.text, **options)
        prompt, length = _lengths(int(getattr(model.config, "max_position_embeddings", None) or 1024))
        ids = torch.ones((1, prompt), dtype=torch.long, device=self.device)

        def write() -> int:
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            return int(made.shape[1]) - prompt

        with evaluating(model), torch.inference_mode():
            return Measured(found.perplexity, _speed(write), found.to_dict())

    def _cosine(self, folder: str, progress: ProgressOption) -> Measured:
        import torch
        from transformers import AutoTokenizer

        from ..evaluate.embeddings import embedding_cosine
        from ..utils.torch_utils import evaluating

        tokenizer, student = AutoTokenizer.from_pretrained(self.source), self._loaded(folder)
        found = embedding_cosine(student, self._loaded(self.source), tokenizer, self.text, progress=progress)
        encoder = student.get_encoder() if student.config.is_encoder_decoder else student.base_model
        length = min(_WRITTEN, int(getattr(student.config, "max_position_embeddings", None) or _WRITTEN))
        ids = torch.ones((1, length), dtype=torch.long, device=self.device)

        def read() -> int:
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
            return length

        with evaluating(student), torch.inference_mode():
            return Measured(found.cosine, _speed(read), found.to_dict())

    def _loaded(self, folder: str) -> Any:
        import torch

        from ..verify.subject import load_whole

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_whole(folder, "float32", self.device)


def _lengths(context: int) -> tuple[int, int]:
    """How many tokens a model reads and writes to measure its speed."""
    prompt = max(1, min(_PROMPT, context // 4))
    return prompt, max(1, min(_WRITTEN, context - prompt))


def _speed(work: Callable[[], int]) -> float:
    """Tokens per second of the fastest of several runs, after one to warm up."""
    work()
    best, begun = 0.0, time.perf_counter()
    for _ in range(_RUNS):
        start = time.perf_counter()
        tokens = work()
        best = max(best, tokens / max(time.perf_counter() - start, 1e-9))
        if time.perf_counter() - begun > _SECONDS:
            break
    return best
