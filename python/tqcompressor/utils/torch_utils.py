"""Small helpers around torch that know nothing of this package. torch is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..errors import ConfigError, DtypeError
from . import validate

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

# Bytes that items of `each_alone` may need together.
_TOGETHER = 1 << 30


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor; torch is not imported to find out."""
    return hasattr(value, "requires_grad")


def as_array(value: Any, name: str) -> NDArray[Any]:
    """`value` as a numpy array; `name` stands in errors.

    A torch tensor may be on any device and have a gradient, which is left out. bfloat16, which numpy lacks, becomes
    float32. Raises `DtypeError` for another dtype that numpy lacks and for a sparse tensor, `ConfigError` for a
    tensor on the meta device, and `ShapeError` for ragged sequences.
    """
    if not is_tensor(value):
        return validate.array(name, value)
    import torch

    if value.is_meta:
        raise ConfigError(f"{name} has no values: it is on the meta device, load it first")
    if value.layout != torch.strided:
        raise DtypeError(f"{name}: expected a dense tensor, got {value.layout}: call .to_dense() first")
    plain = value.detach().cpu()
    try:
        array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(force=True)
    except (TypeError, RuntimeError):
        raise DtypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}: call .float() first"
        ) from None
    return array


def contiguous_array(tensor: torch.Tensor | None) -> Any:
    """A tensor on the CPU as a contiguous array, which shares its memory if it is contiguous; None for None."""
    return None if tensor is None else tensor.detach().contiguous().numpy()


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within the block; afterwards every module has its mode from before."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: Module) -> Iterator[None]:
    """Within the block no parameter requires a gradient; afterwards each does as before."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)


def mean_embedding(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean `(rows, width)`, in float32, of hidden states `(rows, positions, width)` where the mask is 1."""
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    found: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return found


@contextmanager
def without_dropout(model: Module) -> Iterator[None]:
    """Training mode without dropout of any kind within the block: every rate of a module is 0, and restored after it.

    Rates are floats in attributes such as `p` of a dropout, `attention_dropout`, `layerdrop` and `drop_prob`.
    """
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


def without_autocast(like: torch.Tensor) -> AbstractContextManager[object]:
    """Disables autocast on the device of `like` within the block; the meta device has no autocast."""
    import torch

    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def replace_modules(model: Module, modules: Mapping[str, Module]) -> dict[str, Module]:
    """Puts modules in the places of those with the same full names, and returns these.

    Raises `AttributeError` for a name that the model does not have, before anything is changed.
    """
    replaced = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return replaced


def take_modes(modules: Mapping[str, Module], others: Mapping[str, Module]) -> None:
    """Gives modules the mode, training or evaluation, of those with the same names."""
    for name, module in modules.items():
        module.train(others[name].training)


def move(model: Any, device: Any) -> None:
    """`model.to(device)`, in place; transformers' type stubs lack it."""
    model.to(device)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Within the block torch uses `threads` threads, in the whole process; None leaves the number as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_alone(work: Callable[[Any], Any], items: Sequence[Any], size: int) -> list[Any]:
    """`work` of every item, in order: several items at a time, each on one of torch's threads.

    The threads of one small LAPACK call wait for one another longer than they compute, on many cores above all.
    `size` is the memory in bytes that one item needs; where a gibibyte does not hold two, they follow one another,
    each on all threads. After an exception or an interruption no further item begins.
    """
    import torch

    workers = min(torch.get_num_threads(), len(items), _TOGETHER // max(size, 1))
    if workers < 2:
        return [work(item) for item in items]
    with torch_threads(1), ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def on_device(device: Any, *models: Module) -> Iterator[None]:
    """Moves models to a device for the block, and to the CPU after it."""
    try:
        for model in models:
            move(model, device)
        yield
    finally:
        for model in models:
            move(model, "cpu")


def silence_transformers() -> None:
    """Silences the bars and messages of transformers, for good."""
    from transformers.utils import logging

    hub: Any = logging
    hub.set_verbosity_error()
    hub.disable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the bars and messages of transformers for the block."""
    from transformers.utils import logging

    hub: Any = logging
    verbosity, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    silence_transformers()
    try:
        yield
    finally:
        hub.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bar()
