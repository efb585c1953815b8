"""Tensors that have a shape and no storage, and the memory they would take.

A network runs on them in a fraction of a second, whatever its size. torch's ``FakeTensorMode`` does the same with more
checks and takes ten times as long, which a user who waits for a plan notices.
"""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class ShapeOnlyTensor(Tensor):
    """A tensor that says it is on the CPU, so that autocast applies, and holds one on the device "meta"."""

    meta: Tensor
    # functions of torch treat it as a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> "ShapeOnlyTensor":
        made = Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device="cpu"
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a tensor without storage outside LiveBytes")


class LiveBytes(TorchDispatchMode):
    """Under this mode all tensors are made without storage, and the bytes of those alive are counted.

    Attributes:
        now: bytes at the moment.
        peak: largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # the default wraps every operation in a call of torch's compiler, which doubles the time
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wrappers: dict[int, ShapeOnlyTensor] = {}

        def unwrapped(value: Tensor) -> Tensor:
            if not isinstance(value, ShapeOnlyTensor):
                return value.to("meta")
            wrappers[id(value.meta)] = value
            return value.meta

        def wrapped(value: Tensor) -> Tensor:
            if id(value) in wrappers:  # an operation in place returns its argument
                return wrappers[id(value)]
            self._count(value.untyped_storage())
            return ShapeOnlyTensor(value)

        args = _map_tensors(unwrapped, args)
        kwargs = {name: _map_tensors(unwrapped, value) for name, value in (kwargs or {}).items()}
        if _takes_device(func):
            kwargs["device"] = torch.device("meta")
        result = _map_tensors(wrapped, func(*args, **kwargs))
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # views share a storage
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments or results of an operation, with the function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        mapped = [_map_tensors(function, part) for part in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    return value


@cache
def _takes_device(func: Any) -> bool:
    return hasattr(func, "_schema") and any(argument.name == "device" for argument in func._schema.arguments)
