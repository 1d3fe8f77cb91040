"""torch, and what compiles with numba, imported at first use: a plan needs neither, and torch alone takes seconds."""

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import torch as torch

    from fusion.merge import counting as counting
    from fusion.merge import draws as draws
    from fusion.merge import kernels as kernels
else:
    torch = _Lazy("torch")
    counting = _Lazy("fusion.merge.counting")
    draws = _Lazy("fusion.merge.draws")
    kernels = _Lazy("fusion.merge.kernels")
