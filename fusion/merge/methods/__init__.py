"""The merge methods by name. A new one is a file with `merge`, `NEEDS_BASE`, `SCRATCH_BYTES`, listed here."""

from fusion.merge.methods import linear, sce, task_arithmetic
from fusion.merge.methods.base import Merged, Method

METHODS = {method.name: method for method in map(Method.of, (linear, sce, task_arithmetic))}


def get_method(name: str) -> Method:
    """The method of that name; ValueError lists the names where there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown merge method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "Merged", "Method", "get_method"]
