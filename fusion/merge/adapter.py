"""LoRA adapters as peft saves them, applied to the weights while these are read.

W + s·B·A for the rows that are asked for (Hu et al. 2021, arXiv 2106.09685), with s = alpha / r, or alpha / √r (rsLoRA,
Kalajdzievski 2023, arXiv 2312.03732); each row, or each column of a transposed weight, then scaled to the magnitude
that DoRA learned (Liu et al. 2024, arXiv 2402.09353). Names, files and options as peft 0.21 writes them.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.merge.checkpoint import SafetensorsFile, read_json
from fusion.merge.jobs import MERGEABLE, Checkpoint, View, numel
from fusion.merge.lazy import torch
from fusion.merge.overlay import Overlay, Sum, read_float32

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)")
# Options under which the weight that peft computes is another one, or none at all.
_REFUSED = (
    *("target_parameters", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
# Beginnings of training that leave the base as it is; with others the adapter belongs to a base that was changed.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_CONV1D = ("gpt2", "openai-gpt")  # models whose weights are stored as (in, out), but for the output head
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# Elements worked at once. Tiles lie at multiples of their size, whatever is read: BLAS may sum another number of rows
# in another order, and a weight must be the same in every read.
_TILE = 1 << 16


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def base_of(folder: Path) -> str | None:
    """The model that an adapter names as its base: a folder, or a hub id with @revision; None where it names none."""
    config = read_json(folder / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision and not Path(name).is_dir() else name or None


def adapted(base: Checkpoint, folder: Path) -> Checkpoint:
    """The base with an adapter applied: tensors that it changes are float32, those that it replaces in its own type.

    Raises ValueError, one line, for another kind of adapter than LoRA, one whose tensors do not fit the base, and
    options that change the weights in a way that is not known here.
    """
    return Overlay(base, _Adapter(base, folder).views())


@dataclass(frozen=True)
class _LowRank:
    """A View: base + left·right, float32, rows (or columns) scaled to a magnitude if there is one.

    `factors`: left (rows, r) with the scaling in it, right (r, columns). `magnitude`: of each row, or `by_column`.
    """

    base: View
    factors: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    source: str
    magnitude: NDArray[np.float32] | None = None
    by_column: bool = False
    dtype: str = "float32"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _scale: list[NDArray[np.float32]] = field(default_factory=list, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.base.shape

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, float32, with the elements from `start`."""
        rows, columns = self.shape
        if not out.size:
            return
        left, right = self.factors()
        scale = self._column_scale(left, right) if self.by_column and self.magnitude is not None else None
        step = max(1, _TILE // columns)
        for row in range(start // columns // step * step, -(-(start + out.size) // columns), step):
            tile = self._tile(row, min(row + step, rows), left, right)
            if scale is not None:
                tile *= scale
            elif self.magnitude is not None:
                norms = np.sqrt(np.einsum("ij,ij->i", tile, tile, dtype=np.float64))
                tile *= (self.magnitude[row : row + len(tile)] / norms).astype(np.float32)[:, None]
            first, last = max(start, row * columns), min(start + out.size, (row + len(tile)) * columns)
            out[first - start : last - start] = tile.reshape(-1)[first - row * columns : last - row * columns]

    def _tile(self, first: int, last: int, left: torch.Tensor, right: torch.Tensor) -> NDArray[np.float32]:
        columns = self.shape[1]
        tile = (left[first:last] @ right).numpy()
        tile += read_float32(self.base, first * columns, (last - first) * columns).reshape(-1, columns)
        return tile

    def _column_scale(self, left: torch.Tensor, right: torch.Tensor) -> NDArray[np.float32]:
        """What each column is multiplied by; the whole tensor is read for it, once."""
        with self._lock:
            if not self._scale:
                rows, columns = self.shape
                step = max(1, _TILE // columns)
                squares = np.zeros(columns)
                for row in range(0, rows, step):
                    tile = self._tile(row, min(row + step, rows), left, right)
                    squares += np.einsum("ij,ij->j", tile, tile, dtype=np.float64)
                self._scale.append((self.magnitude / np.sqrt(squares)).astype(np.float32))
            return self._scale[0]


class _Adapter:
    """An adapter's folder, read and checked against a base."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._base, self._folder = base, folder
        self._config = read_json(folder / CONFIG)
        self._refuse_others()
        if not (folder / WEIGHTS).is_file():
            pickled = any(folder.glob("adapter_model.bin"))
            why = "only pickled weights, which are never loaded; load it with peft and save it again" if pickled else ""
            raise ValueError(f"{folder} has {why or 'no ' + WEIGHTS + '; download it again'}")
        self._file = SafetensorsFile(folder / WEIGHTS)
        # The factors of the tensors in work; not of all of them, which the views outlive.
        self._factors = lru_cache(maxsize=4)(self._load)

    def views(self) -> dict[str, View]:
        """The changed tensors by the names they have in the base."""
        parts: dict[str, dict[str, View]] = {}
        views: dict[str, View] = {}
        for key in sorted(self._file.names):
            name, stored = key.removeprefix(PREFIX), self._file.view(key)
            if stored.dtype not in MERGEABLE:
                raise ValueError(f"{self._folder}: {key} is {stored.dtype}; it must be one of {', '.join(MERGEABLE)}")
            # an old release of peft left the last word out, a new one takes it away when it saves
            if found := _PART.fullmatch(name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")):
                parts.setdefault(found[1], {})[found[2]] = stored
            elif not self._is_tied_copy(name, stored):
                weight = self._weight(key, name.replace(".base_layer.", "."))
                self._refuse_untied(weight)
                views[weight] = self._fitting(key, stored, self._base.view(weight).shape)
        for module, own in parts.items():
            if bias := own.pop("lora_B.bias", None):
                weight = self._weight(f"{module}.lora_B.bias", f"{module}.bias")
                under = views.get(weight) or self._base.view(weight)
                views[weight] = Sum(
                    under, self._fitting(f"{module}.lora_B.bias", bias, under.shape), self._scale(module)
                )
            weight = self._weight(f"{module}.{min(own)}" if own else module, f"{module}.weight")
            self._refuse_untied(weight)
            views[weight] = self._low_rank(module, own, views.get(weight) or self._base.view(weight))
        if not views:
            raise ValueError(f"{self._folder}: {WEIGHTS} is empty; save the adapter again")
        return views

    def _low_rank(self, module: str, parts: Mapping[str, View], under: View) -> View:
        """A weight with the parts of a module applied."""
        embedding = "lora_embedding_A" in parts
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        if absent := [name for name in names if name not in parts]:
            raise ValueError(
                f"{self._folder}: {module} has {', '.join(parts)} but no {absent[0]}; save the adapter again"
            )
        a, b = (parts[name] for name in names)
        rank = self._pattern("rank_pattern", module, self._config.get("r", 8))
        if len(under.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            raise ValueError(
                f"{self._folder}: {module} is no matrix but of shape {under.shape}; only matrices are adapted"
            )
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"{self._folder}: {module} has rank {a.shape[0]}, where {CONFIG} says {rank}")
        product = (b.shape[0], a.shape[1])  # of B·A: (out, in)
        transposed = embedding or self._stored_transposed(module, product, under.shape)
        if under.shape != (product[::-1] if transposed else product):
            raise ValueError(
                f"{self._folder}: {module} changes a weight of shape {product[::-1] if embedding else product}, "
                f"which is {under.shape} in {self._base.folder}; it belongs to another base"
            )
        magnitude = None
        if (stored := parts.get("lora_magnitude_vector")) is not None:
            count = b.shape[0]
            if numel(stored.shape) != count:
                raise ValueError(f"{self._folder}: {module} has {numel(stored.shape)} magnitudes for {count} outputs")
            magnitude = read_float32(stored, 0, count)
        if (magnitude is not None) != bool(self._config.get("use_dora")):
            raise ValueError(f"{self._folder}: {CONFIG} says use_dora = {not magnitude}, its weights the opposite")
        return _LowRank(
            under,
            lambda: self._factors(module, names, transposed),
            f"{under.source} with {module} of {self._folder}",
            magnitude,
            by_column=transposed,
        )

    def _load(self, module: str, names: tuple[str, str], transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """left and right of a module, float32."""
        views = [self._file.view(self._key(f"{module}.{name}")) for name in names]
        a, b = (torch.from_numpy(read_float32(v, 0, numel(v.shape)).reshape(v.shape)) for v in views)
        left, right = (a.T, b.T) if transposed else (b, a)
        return left.contiguous() * self._scale(module), right.contiguous()

    def _key(self, name: str) -> str:
        return PREFIX + name if PREFIX + name in self._file.names else name

    def _scale(self, module: str) -> float:
        rank = self._pattern("rank_pattern", module, self._config.get("r", 8))
        alpha = self._pattern("alpha_pattern", module, self._config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _pattern(self, option: str, module: str, otherwise: Any) -> Any:
        """A module's number: of the first pattern, a regular expression, that its name ends with."""
        for pattern, value in (self._config.get(option) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise

    def _stored_transposed(self, module: str, product: tuple[int, int], shape: tuple[int, ...]) -> bool:
        """Whether a weight is stored as (in, out). Its shape says so, but for a square one."""
        if product[0] != product[1]:
            return shape == product[::-1]
        if self._base.config.get("model_type") in _CONV1D:
            return not module.endswith("lm_head")
        return bool(self._config.get("fan_in_fan_out"))

    def _weight(self, key: str, name: str) -> str:
        """The base's name of a tensor; where a model was saved without its head, a prefix is more or less."""
        if name in self._base.names:
            return name
        close = [own for own in self._base.names if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(close) != 1:
            raise ValueError(
                f"{self._folder}: {key.removeprefix(PREFIX)} finds no tensor {name} in {self._base.folder}"
                + ("; its output head is tied to its embeddings" if self._tied(name) else "; is it of another base?")
            )
        return close[0]

    def _tied(self, name: str) -> bool:
        """Whether it is an output head that the base has not by itself."""
        return name in _HEADS and name not in self._base.names and self._base.config.get("tie_word_embeddings", True)

    def _refuse_untied(self, weight: str) -> None:
        """ValueError for an embedding that is changed while the head it is tied to stays what it is in the base.

        So the adapter was trained; peft's own merge changes the head with it.
        """
        if not weight.endswith(_EMBEDDINGS) or self._config.get("task_type") not in (None, "CAUSAL_LM"):
            return
        held = any(key.removeprefix(PREFIX) in _HEADS for key in self._file.names)
        if not held and all(map(self._tied, _HEADS)):
            raise ValueError(
                f"{self._folder}: it changes {weight} and leaves the output head that is tied to it in "
                f"{self._base.folder} as it is; untie the base first"
            )

    def _is_tied_copy(self, name: str, stored: View) -> bool:
        """Whether it is the output head that peft saves beside the embeddings it is tied to, and equal to them."""
        if not self._tied(name):
            return False
        twins = [key for key in self._file.names if key.endswith(_EMBEDDINGS)]
        twin = self._file.view(twins[0]) if len(twins) == 1 else None
        if twin is None or (twin.shape, twin.dtype) != (stored.shape, stored.dtype):
            return False
        count = numel(stored.shape)
        for at in range(0, count, _TILE):
            ours, other = (read_float32(view, at, min(_TILE, count - at)) for view in (stored, twin))
            if not np.array_equal(ours, other):
                return False
        return True

    def _fitting(self, key: str, stored: View, shape: tuple[int, ...]) -> View:
        if stored.shape != shape:
            raise ValueError(
                f"{self._folder}: {key.removeprefix(PREFIX)} is {stored.shape}, in {self._base.folder} {shape}; where "
                "the vocabulary was resized, merge the adapter into its base with peft and give that model"
            )
        return stored

    def _refuse_others(self) -> None:
        """ValueError for what peft would compute in another way."""
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"{self._folder}: an adapter of type {kind}; only LORA is applied: merge it with peft first"
            )
        for option in _REFUSED:
            if self._config.get(option):
                raise ValueError(f"{self._folder}: {option} is not supported; merge the adapter with peft first")
        began = self._config.get("init_lora_weights", True)
        if began not in _PLAIN_BEGINNINGS:
            raise ValueError(
                f"{self._folder}: init_lora_weights = {began!r} changed the base in training; save it as a plain "
                "adapter (path_initial_model_for_weight_conversion in peft) or merge it with peft first"
            )
