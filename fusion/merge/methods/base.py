"""What merge methods share: the result, the registry entry, typed parameters, the walk over elements."""

import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

# Elements in flight at once: float64 copies of this many elements a model fit the processor's cache, so that
# exact arithmetic costs neither memory nor much time.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Merged:
    """`tensor`: float32, in the shape of the inputs; `weights`: the coefficient of each model, in order."""

    tensor: Tensor
    weights: list[float]


@dataclass(frozen=True)
class Range:
    """The numbers a parameter may take, as `Annotated[float, Range(0, 1, open_low=True)]`; finite always."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        left = "(" if self.open_low or self.low == -math.inf else "["
        return f"a number in {left}{self.low:g}, {self.high:g}{')' if self.high == math.inf else ']'}"


@dataclass(frozen=True)
class Method:
    """One way to merge one tensor.

    `merge(base, models, *, …)` takes tensors of one shape in any floating dtype and returns `Merged`; `base`
    may be None where `needs_base` is false. `scratch_bytes` is what it holds for each element beside inputs
    and result.
    """

    name: str
    merge: Callable[..., Merged]
    needs_base: bool
    scratch_bytes: int

    @classmethod
    def of(cls, module: ModuleType) -> "Method":
        """The method a module defines by `merge`, `NEEDS_BASE` and `SCRATCH_BYTES`, named as its file."""
        return cls(module.__name__.rpartition(".")[2], module.merge, module.NEEDS_BASE, module.SCRATCH_BYTES)

    def check(self, given: Mapping[str, Any], models: int) -> dict[str, Any]:
        """The parameters as `merge` takes them, for a number of models; what is absent takes its default.

        A list parameter has one number for each model. Raises ValueError naming the method, the parameter,
        its value and what would do, also where `merge` itself refuses (weights that sum to 0).
        """
        hints = typing.get_type_hints(self.merge, include_extras=True)
        known = [p.name for p in inspect.signature(self.merge).parameters.values() if p.kind is p.KEYWORD_ONLY]
        checked = {}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{self.name}: unknown parameter {name} = {value!r}; it takes {', '.join(known)}")
            checked[name] = _checked(f"{self.name}: {name} = {value!r}", value, hints[name], models)
        # What one parameter's type cannot say, the method says when tried on a single element.
        self.merge(torch.zeros(1), [torch.zeros(1)] * models, **checked)
        return checked


def _checked(what: str, value: Any, hint: Any, models: int) -> Any:
    """`value` if the type hint of a parameter allows it; `what` opens the refusal."""
    allowed = Range()
    if typing.get_origin(hint) is typing.Annotated:
        hint, allowed = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{what} must be one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{what} must be true or false")
        return value
    if hint is float:
        if not _is_number(value) or value not in allowed:
            raise ValueError(f"{what} must be {allowed}")
        return float(value)
    assert hint == list[float] | None, f"no rule for a parameter of type {hint}"
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(_is_number(v) and v in allowed for v in value):
        raise ValueError(f"{what} must be a list, each {allowed}")
    if len(value) != models:
        raise ValueError(f"{what} has {len(value)} numbers for {models} models; give one for each")
    return [float(v) for v in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """K tensors of one shape, block by block: (place in the flat tensor, float64 values of shape (K, B))."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        place = slice(start, start + BLOCK)
        yield place, torch.stack([row[place].to(torch.float64) for row in flat])


def delta_blocks(base: Tensor, models: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The same with δ_k = θ_k − θ₀: (place, θ₀ of shape (B,), δ of shape (K, B)), both float64.

    A difference of two float32, or narrower, numbers of like size is exact in float64: θ₀ + δ gives θ back.
    """
    for place, values in blocks([base, *models]):
        yield place, values[0], values[1:] - values[0]


def mean_squares(base: Tensor, models: Sequence[Tensor]) -> list[float]:
    """mean(δ_k²) over the elements, for each model; 0 for a tensor without elements."""
    total = torch.zeros(len(models), dtype=torch.float64)
    for _, _, deltas in delta_blocks(base, models):
        total += deltas.square().sum(1)
    return (total / max(base.numel(), 1)).tolist()


def largest(values: Tensor, count: int) -> Tensor:
    """Mask (bool, N) of the `count` largest of N non-negative float32 numbers; of equal ones, the first.

    torch.topk leaves open which of equal elements it takes, and bfloat16 checkpoints are full of equal
    differences. The bits of non-negative floats order as integers do: two histograms of 16 bits find the
    threshold exactly.
    """
    assert values.dtype is torch.float32 and values.dim() == 1 and count <= values.numel()
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    if count == 0:
        return mask
    parts = values.view(torch.int32).split(BLOCK)
    high = sum(
        (torch.bincount(part >> 16, minlength=1 << 16) for part in parts),
        torch.zeros(1 << 16, dtype=torch.int64),
    )
    top, wanted = _bucket(high, count)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts:
        low += torch.bincount(part[part >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, ties = _bucket(low, wanted)
    threshold = (top << 16) | bottom
    for part, chosen in zip(parts, mask.split(BLOCK), strict=True):
        chosen |= part > threshold
        first = (part == threshold).nonzero().squeeze(1)[:ties]
        chosen[first] = True
        ties -= first.numel()
    return mask


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket that holds the `count`-th largest entry, and how many are still wanted from that bucket."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    above = int(from_top[place - 1]) if place else 0
    return histogram.numel() - 1 - place, count - above
