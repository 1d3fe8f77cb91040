"""The stream of tensors through a method: planned from headers, then merged one by one into a new folder."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.merge.checkpoint import CheckpointReader, CheckpointWriter
from fusion.merge.methods import get_method
from fusion.merge.methods.base import mean_squares
from fusion.merge.recipe import MergeRecipe

# Held in memory until it is full, so smaller than what one would upload.
SHARD_BYTES = 2_000_000_000

_MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result, written in `dtype`; one that is not `merged` is copied (integers, masks)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merged: bool
    bytes_to_read: int  # from all folders together
    bytes_to_write: int
    peak_bytes: int  # held while it is merged: inputs, result, the method's scratch

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, in bytes. The peak comes on top of what the process holds with nothing loaded."""

    tensors: tuple[PlannedTensor, ...]
    bytes_to_read: int
    bytes_to_write: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    `coefficients` has one for each model, empty for a tensor that was copied; `updates` is mean(δ_k²) for
    each model, empty where there is no base to differ from.
    """

    name: str
    numel: int
    bytes_read: int
    coefficients: tuple[float, ...]
    updates: tuple[float, ...]


def plan(recipe: MergeRecipe, max_shard_bytes: float = SHARD_BYTES) -> MergePlan:
    """Check all that can be known before a weight is merged, and count bytes; writes nothing.

    Reads headers, and the few tensors that must be the same everywhere. Raises ValueError, one line, for an
    unknown method or parameter, a base that is missing, and folders whose tensors do not correspond.
    """
    method = get_method(recipe.method)
    method.check(recipe.parameters, len(recipe.models))
    if method.needs_base and recipe.base is None:
        raise ValueError(
            f"{recipe.method} needs a base, the model that the others were trained from; name it as `base`"
        )
    with ExitStack() as stack:
        reference, inputs, _ = _open(recipe, stack)
        for other in inputs:
            _check_names(reference, other)
        tensors = tuple(
            _plan_tensor(name, reference, inputs, recipe.dtype, method.scratch_bytes) for name in reference.names
        )
    to_write = sum(tensor.bytes_to_write for tensor in tensors)
    largest = max((tensor.peak_bytes for tensor in tensors), default=0)
    return MergePlan(
        tensors,
        sum(tensor.bytes_to_read for tensor in tensors),
        to_write,
        largest + int(min(to_write, max_shard_bytes)),
    )


def merge(
    recipe: MergeRecipe,
    out: str | Path,
    on_tensor: Callable[[TensorReport], None] | None = None,
    max_shard_bytes: float = SHARD_BYTES,
) -> list[TensorReport]:
    """Merge the recipe's local folders into the folder `out`, which must not exist or be empty.

    Calls `on_tensor` after each tensor. The folder appears under its name when all of it is written; after an
    error nothing of it is left. Raises what `plan` raises, ValueError for weights that are not finite,
    OSError for the disk.
    """
    planned = plan(recipe, max_shard_bytes)
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < planned.bytes_to_write:
        raise OSError(
            errno.ENOSPC,
            f"{planned.bytes_to_write} bytes needed: {os.strerror(errno.ENOSPC)}",
            str(out.parent),
        )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had our number
    try:
        reports = _stream(recipe, planned, CheckpointWriter(partial, max_shard_bytes), on_tensor)
        os.replace(partial, out)
    except BaseException:  # an interrupt too must leave nothing half-written
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return reports


def _open(recipe: MergeRecipe, stack: ExitStack) -> tuple[CheckpointReader, list[CheckpointReader], bool]:
    """(the reader that sets names, shapes and files; all readers, a base first; whether there is a base)."""
    folders = [*([] if recipe.base is None else [recipe.base]), *recipe.models]
    readers = [stack.enter_context(CheckpointReader(folder)) for folder in folders]
    return readers[0], readers, recipe.base is not None


def _stream(
    recipe: MergeRecipe,
    planned: MergePlan,
    writer: CheckpointWriter,
    on_tensor: Callable[[TensorReport], None] | None,
) -> list[TensorReport]:
    method = get_method(recipe.method)
    parameters = method.check(recipe.parameters, len(recipe.models))
    reports = []
    with ExitStack() as stack:
        reference, readers, has_base = _open(recipe, stack)
        for tensor in planned.tensors:
            coefficients: Sequence[float] = ()
            updates: Sequence[float] = ()
            if tensor.merged:
                inputs = [_finite(reader, tensor.name) for reader in readers]
                base, models = (inputs[0], inputs[1:]) if has_base else (None, inputs)
                merged = method.merge(base, models, **parameters)
                coefficients = merged.weights
                updates = () if base is None else mean_squares(base, models)
                writer.add(tensor.name, _cast(merged.tensor, tensor))
                del inputs, base, models, merged
            else:
                writer.add(tensor.name, reference.tensor(tensor.name))
            report = TensorReport(tensor.name, tensor.numel, tensor.bytes_to_read, tuple(coefficients), tuple(updates))
            reports.append(report)
            if on_tensor is not None:
                on_tensor(report)
        writer.finish(copy_from=reference.folder)
    return reports


def _finite(reader: CheckpointReader, name: str) -> Tensor:
    tensor = reader.tensor(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} of {reader.folder} holds a weight that is not finite; that model is broken")
    return tensor


def _cast(tensor: Tensor, planned: PlannedTensor) -> Tensor:
    """The result in the dtype to write; ValueError where it does not fit."""
    cast = tensor.to(planned.dtype)
    if not torch.isfinite(cast).all():
        dtype = str(planned.dtype).removeprefix("torch.")
        raise ValueError(f"{planned.name}: the merged weights do not fit {dtype}; set dtype: float32")
    return cast


def _check_names(reference: CheckpointReader, other: CheckpointReader) -> None:
    """The same tensors in both, but for a head that `other` saved although it is its embedding again."""
    absent = sorted(set(reference.names) - set(other.names))
    if absent:
        raise ValueError(
            f"{other.folder} has no {_some(absent)}, which {reference.folder} has; merge models of one architecture"
        )
    extra = sorted(set(other.names) - set(reference.names))
    untied = [name for name in extra if not _is_embedding_again(other, name)]
    if untied:
        raise ValueError(
            f"{other.folder} has {_some(untied)}, which {reference.folder} has not and which is no copy "
            "of the embedding; merge models of one architecture, with heads tied in all or in none"
        )


def _is_embedding_again(reader: CheckpointReader, name: str) -> bool:
    """Whether a tensor is, bit for bit, another tensor of the same folder with a row for each id."""
    shape = reader.shape(name)
    if len(shape) != 2 or shape[0] != _vocabulary(reader.config):
        return False
    twins = [other for other in reader.names if other != name and reader.shape(other) == shape]
    return any(torch.equal(reader.tensor(name), reader.tensor(twin)) for twin in twins)


def _plan_tensor(
    name: str, reference: CheckpointReader, readers: list[CheckpointReader], dtype: str | None, scratch: int
) -> PlannedTensor:
    """One tensor, checked over all folders."""
    shape, stored = reference.shape(name), reference.dtype(name)
    for reader in readers:
        _check_shape(name, reference, reader)
        found = reader.dtype(name)
        if found.is_floating_point != stored.is_floating_point or (found.is_floating_point and found not in _MERGEABLE):
            raise ValueError(
                f"{name} of {reader.folder} is {found}; weights must be float32, bfloat16 or float16: "
                "dequantize or convert that model"
            )
    numel = torch.Size(shape).numel()
    if not stored.is_floating_point:
        _check_same(name, reference, readers)
        size = numel * stored.itemsize
        return PlannedTensor(name, shape, stored, False, size, size, size)
    written: torch.dtype = stored if dtype is None else getattr(torch, dtype)
    to_read = numel * sum(reader.dtype(name).itemsize for reader in readers)
    to_write = numel * written.itemsize
    # float32 result beside the inputs and the scratch; then the result as written, and one byte for the
    # finite check.
    peak = to_read + numel * (torch.float32.itemsize + max(scratch, written.itemsize + 1))
    return PlannedTensor(name, shape, written, True, to_read, to_write, peak)


def _check_shape(name: str, reference: CheckpointReader, other: CheckpointReader) -> None:
    ours, theirs = reference.shape(name), other.shape(name)
    if ours == theirs:
        return
    rows = (_vocabulary(reference.config), _vocabulary(other.config))
    if ours[1:] == theirs[1:] and (ours[:1], theirs[:1]) == ((rows[0],), (rows[1],)):
        raise ValueError(
            f"{name} has {rows[0]} rows in {reference.folder} and {rows[1]} in {other.folder}: the "
            "vocabularies differ; train both with one tokenizer, or resize where only padding differs"
        )
    raise ValueError(
        f"{name} has shape {ours} in {reference.folder} and {theirs} in {other.folder}; "
        "merge models of one architecture"
    )


def _check_same(name: str, reference: CheckpointReader, readers: list[CheckpointReader]) -> None:
    expected = reference.tensor(name)
    for reader in readers:
        found = reader.tensor(name)
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise ValueError(
                f"{name} ({expected.dtype}) differs between {reference.folder} and {reader.folder}; "
                "only floating weights can be merged"
            )


def _vocabulary(config: dict[str, Any]) -> int | None:
    """Rows of the embedding as the configuration, or its part for the language model, states them."""
    if "vocab_size" in config:
        return config["vocab_size"]
    parts = [part["vocab_size"] for part in config.values() if isinstance(part, dict) and "vocab_size" in part]
    return parts[0] if parts else None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
