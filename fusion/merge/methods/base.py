"""What merge methods share: the inputs they read block by block, the result, the range of a parameter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from fusion.merge.lazy import torch

T = TypeVar("T")

# Elements of a block: of less, threads wait for Python's lock between one operator and the next; of more, for memory.
# Sums are taken block by block, so its size is part of every result: it depends on the number of inputs alone, for the
# same bytes on any number of threads, ranks and machines.
BLOCK = 1 << 18


def block_elements(rows: int) -> int:
    """Elements of a block of so many inputs: BLOCK for up to eight, and less of more, to the same memory."""
    return BLOCK if rows <= 8 else BLOCK // 2 if rows <= 16 else BLOCK // 4


@dataclass(frozen=True)
class Block:
    """A stretch of one tensor in all inputs, from element `start` on; its numbers are made when they are asked for.

    On the CPU they are a NumPy array, for compiled loops; a method that asks for nothing else has no need of torch.
    """

    start: int
    size: int  # B
    load: Callable[[], np.ndarray | torch.Tensor]
    has_base: bool
    count: int  # of models

    @cached_property
    def _numbers(self) -> np.ndarray | torch.Tensor:
        return self.load()

    def make(self) -> None:
        """Make the numbers now."""
        _ = self._numbers

    @property
    def on_cpu(self) -> bool:
        """Whether `array` is there."""
        return isinstance(self._numbers, np.ndarray)

    @property
    def array(self) -> np.ndarray:
        """`values` on the CPU."""
        assert isinstance(self._numbers, np.ndarray)
        return self._numbers

    @cached_property
    def values(self) -> torch.Tensor:
        """(R, B), float32 where all that is stored is narrower, else float64.

        So θ₀ + (θ − θ₀) gives θ back in the precision it was stored in. The rows are the base if there is one, the
        models, their statistics if any.
        """
        return torch.from_numpy(self._numbers) if isinstance(self._numbers, np.ndarray) else self._numbers

    @property
    def base(self) -> torch.Tensor:
        """θ₀, (B,)."""
        assert self.has_base
        return self.values[0]

    @property
    def models(self) -> torch.Tensor:
        """θ_k, (K, B)."""
        return self.values[self.has_base : self.has_base + self.count]

    @property
    def statistics(self) -> torch.Tensor:
        """A number for each element of each model, (K, B), where the recipe names `statistics`."""
        return self.values[self.has_base + self.count :]

    @cached_property
    def deltas(self) -> torch.Tensor:
        """δ_k = θ_k − θ₀, (K, B)."""
        return self.models - self.base


class Inputs(ABC):
    """One tensor of every model, of the base and the statistics, as a method may read it: more than once, in blocks.

    `name`, `shape`: of the tensor written; `models`: K; `layer`: its layer's number from 0, None outside of layers;
    `layers`: how many there are; `seed`: for what is drawn; `surveyed`: what the method's survey of all tensors came
    to, None where it has none; `statistics_given`: whether there are statistics for this tensor.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    has_base: bool
    layer: int | None = None
    layers: int = 0
    seed: int = 0
    surveyed: Any = None
    statistics_given: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row, the last dimension; of all of it for fewer than two."""
        return max(1, self.shape[-1] if len(self.shape) > 1 else self.numel)

    @abstractmethod
    def map(self, work: Callable[[Block], T], rows: bool = False) -> list[T]:
        """What `work` gives for each block, in order; with `rows` a block is whole rows, at least one.

        Blocks are worked at the same time: `work` shares nothing, and a block's values are good within `work` alone.
        """

    @abstractmethod
    def one(self, start: int, work: Callable[[Block], T]) -> T:
        """What `work` gives for the block that begins at `start`, one that `map` came by."""

    @abstractmethod
    def whole(self, index: int | None) -> torch.Tensor:
        """Model `index`, or the base for None, in full: in the tensor's shape, float32 or float64 as in blocks."""

    @abstractmethod
    def statistic(self, index: int) -> torch.Tensor:
        """The statistic of model `index` in full, in its own shape, float32 or float64."""

    def delta(self, index: int) -> torch.Tensor:
        """δ of a model in full."""
        return self.whole(index).sub_(self.whole(None))


class InMemory(Inputs):
    """Inputs from tensors that are in memory; what tests and small uses need."""

    def __init__(
        self,
        base: torch.Tensor | None,
        models: Sequence[torch.Tensor],
        statistics: Sequence[torch.Tensor] = (),
        *,
        name: str = "weight",
        layer: int | None = None,
        layers: int = 0,
        seed: int = 0,
        surveyed: Any = None,
    ) -> None:
        self.name, self.shape, self.models = name, tuple(models[0].shape), len(models)
        self.has_base, self.layer, self.layers = base is not None, layer, layers
        self.seed, self.surveyed = seed, surveyed
        self._base, self._models, self._statistics = base, list(models), list(statistics)
        everything = [*([] if base is None else [base]), *models, *statistics]
        wide = any(tensor.element_size() > 2 for tensor in [*([] if base is None else [base]), *models])
        self._dtype = torch.float64 if wide else torch.float32
        self.statistics_given = bool(statistics)
        self._rows = [tensor.reshape(-1) for tensor in everything if tuple(tensor.shape) == self.shape]

    def map(self, work: Callable[[Block], T], rows: bool = False) -> list[T]:
        block = block_elements(len(self._rows))
        size = max(1, block // self.row) * self.row if rows else block
        found = []
        for start in range(0, self.numel, size):
            found.append(work(self._block(start, size)))
        return found

    def one(self, start: int, work: Callable[[Block], T]) -> T:
        return work(self._block(start, block_elements(len(self._rows))))

    def _block(self, start: int, size: int) -> Block:
        def load() -> np.ndarray | torch.Tensor:
            values = torch.stack([row[start : start + size].to(self._dtype) for row in self._rows])
            return values.numpy() if values.is_cpu else values

        return Block(start, min(size, self.numel - start), load, self.has_base, self.models)

    def whole(self, index: int | None) -> torch.Tensor:
        tensor = self._base if index is None else self._models[index]
        assert tensor is not None
        return tensor.to(self._dtype, copy=True)

    def statistic(self, index: int) -> torch.Tensor:
        return self._statistics[index].to(self._dtype, copy=True)


@dataclass(frozen=True)
class Part:
    """What a method made of a block.

    `values`: (B,); `kept`, `erased`: how many elements of each model it selected, and dropped for their sign
    afterwards; empty for a method that does neither.
    """

    values: np.ndarray | torch.Tensor
    kept: Sequence[int] = ()
    erased: Sequence[int] = ()


@dataclass(frozen=True)
class Merged:
    """The result: what becomes of a block, and the coefficient of each model in order (its mean, where it varies).

    `rows`: `block` wants whole rows.
    """

    weights: list[float]
    block: Callable[[Block], Part]
    rows: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, weights: Sequence[float]) -> Merged:
        """A result that is there in full."""
        flat = tensor.reshape(-1)
        return cls(list(weights), lambda block: Part(flat[block.start : block.start + block.size]))


def totals(inputs: Inputs, of: Callable[[Block], Sequence[float]], count: int) -> list[float]:
    """Sums over blocks, in their order, of `count` numbers that each has.

    Numbers and no tensors: small ones that stay, between large ones that go, break up the heap.
    """
    found = inputs.map(of)
    return [sum(column) for column in zip(*found, strict=True)] if found else [0.0] * count


def joined(inputs: Inputs, merged: Merged) -> torch.Tensor:
    """The merged tensor in full, in the shape of the inputs."""
    parts = inputs.map(lambda block: torch.as_tensor(merged.block(block).values), rows=merged.rows)
    return torch.cat(parts).view(inputs.shape) if parts else inputs.whole(0)


@dataclass(frozen=True)
class Range:
    """The numbers a parameter may take, as `Annotated[float, Range(0, 1, open_low=True)]`; finite always."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"
