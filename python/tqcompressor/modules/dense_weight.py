"""The `weight` of a compressed module, which other code reads: the dense matrix, formed on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import ReadOnlyError

# What these return needs no values. Code of transformers reads a dtype or a device in every forward pass.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_meta", "is_cuda")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device")
_WITHOUT_VALUES = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
    getattr(torch.Tensor, name) for name in _METHODS
}
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
# `weight.data = …` and `weight.requires_grad = …` are calls of `__set__`.
_WRITES = {"__set__", "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)}


class CompressedBase(nn.Module):
    """The base of all compressed modules: `weight`, laid out as in the module that this one replaces."""

    # Whether the replaced module stores the transpose of `dense_weight()`: nn.Linear does.
    weight_is_transposed = True

    def dense_weight(self) -> torch.Tensor:
        """The dense matrix, in the dtype of the factors."""
        raise NotImplementedError

    def _a_factor(self) -> torch.Tensor:
        """A factor, which has the dtype, the device and `requires_grad` of all."""
        raise NotImplementedError

    def _dense_shape(self) -> tuple[int, int]:
        """The shape of `dense_weight()`."""
        own: Any = self
        return own.in_features, own.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight for code that reads it: formed when its values are read, differentiable, read-only.

        Each read of values forms the matrix again; `forward` does not use it.
        """
        # The compiler drops what is not used, and cannot trace the creation of a tensor subclass.
        return self._stored() if torch.compiler.is_compiling() else DenseWeight(self)

    def _stored(self) -> torch.Tensor:
        dense = self.dense_weight()
        return dense.t() if self.weight_is_transposed else dense


class Lookup(CompressedBase):
    """The base of the compressed embeddings."""

    weight_is_transposed = False
    # Read by code that expects an nn.Embedding. The factors of that token's row are trained like all others.
    padding_idx: int | None = None

    def _dense_shape(self) -> tuple[int, int]:
        own: Any = self
        return own.num_embeddings, own.embedding_dim


class DenseWeight(torch.Tensor):
    """A tensor with the shape, dtype and device of a dense weight, whose values are formed when they are read.

    Any operation on its values is done on the product of the factors, through which gradients flow. Operations in place
    raise `ReadOnlyError`, because the product is not stored; on its rows and other views, too. transformers'
    initialisation functions leave it alone.
    """

    _module: CompressedBase
    _detached: bool

    @staticmethod
    def __new__(cls, module: CompressedBase, detached: bool = False) -> DenseWeight:
        """The weight of `module`; `detached` is for `.data`."""
        like = module._a_factor()
        shape = module._dense_shape()
        weight: DenseWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            shape[::-1] if module.weight_is_transposed else shape,
            dtype=like.dtype,
            device=like.device,
            requires_grad=like.requires_grad and not detached,
        )
        weight._module = module
        weight._detached = detached
        # transformers initialises only what has no values yet.
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def _formed(self) -> torch.Tensor:
        formed = self._module._stored()
        return formed.detach() if self._detached else formed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reads properties from the wrapper, and forms the weight for anything else."""
        kwargs = kwargs or {}
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return DenseWeight(args[0]._module, detached=True)
        return _called(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As `__torch_function__`, for calls from within torch."""
        args, kwargs = tree_map_only(DenseWeight, DenseWeight._formed, (args, kwargs or {}))
        return func(*args, **kwargs)


# These are about one tensor, and not about its values.
_OF_ONE_TENSOR = {torch.Tensor.requires_grad_, torch.Tensor.retain_grad, torch.Tensor.register_hook} | {
    getattr(torch.Tensor, name).__get__ for name in ("grad", "requires_grad", "is_leaf")
}


class DenseView(torch.Tensor):
    """A view of the values of a `DenseWeight`: writing it raises `ReadOnlyError`, since the values would be lost."""

    _module: CompressedBase
    # transformers initialises only what has no values yet.
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuses operations in place; what is computed from it is a plain tensor again."""
        if func in _OF_ONE_TENSOR:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _called(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a plain tensor, which any program can load."""
        plain: Any = _plain_view(self)
        return plain.__reduce_ex__(protocol)


def _plain_view(view: DenseView) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return view.as_subclass(torch.Tensor)


def _called(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Does an operation on the dense values; raises `ReadOnlyError` if it would write them."""
    written = _written(func, args, kwargs)
    if isinstance(written, DenseWeight | DenseView):
        module = written._module
        error = ReadOnlyError(
            f"{func.__name__} would write the dense weight of a {type(module).__name__}, which is the product of its "
            "factors: write the factors, or call model.dequantize() first"
        )
        error.module = module
        raise error
    modules: dict[int, CompressedBase] = {}

    def plain(tensor: Any) -> torch.Tensor:
        values = tensor._formed() if isinstance(tensor, DenseWeight) else _plain_view(tensor)
        modules[_storage(values)] = tensor._module
        return values

    def guarded(result: torch.Tensor) -> torch.Tensor:
        storage = _storage(result)
        module = None if storage < 0 else modules.get(storage)
        if module is None:
            return result
        view = result.as_subclass(DenseView)
        view._module = module
        return view

    args, kwargs = tree_map_only((DenseWeight, DenseView), plain, (args, kwargs))
    return tree_map_only(torch.Tensor, guarded, func(*args, **kwargs))


def _storage(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; -1 for those that torch traces."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1


def _written(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that an operation changes, if any: `normal_`, `+=`, `w[…] =`, `out=`."""
    name = func.__name__
    if name in _WRITES or (name.endswith("_") and not name.startswith("__")):
        # torch.nn.init passes names.
        return args[0] if args else kwargs.get("tensor")
    return kwargs.get("out")
