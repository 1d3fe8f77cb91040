"""A checkpoint folder written as its tensors come, in any order and in stretches, and taken up again after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.merge.checkpoint import CODES, INDEX, SINGLE
from fusion.merge.jobs import STORAGE, Job, Layout, numel

_CODE_OF = {name: code for code, (name, _) in CODES.items()}
# A new checkpoint takes everything of the old one but these: other weights, whatever could be executed, and
# what speaks of the old one alone (its manifest, its card, its training run).
_LEFT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"),
    *(".pkl", ".pickle", ".py", ".pyc", ".so", ".sh"),
}
_LEFT_NAMES = {"manifest.json", "README.md", "trainer_state.json", "all_results.json", "train_results.json"}
_LEFT_NAMES |= {"adapter_config.json", "merge_report.json"}
_TEMPLATES = "additional_chat_templates"  # the one subfolder of a tokenizer that transformers writes
_OWN = ".merge"  # of a merge that is not through: what it is, its lock, the reports of finished shards


@dataclass(frozen=True)
class Shard:
    """A file of the result, laid out before anything is written."""

    name: str
    jobs: tuple[Job, ...]
    header: bytes
    offset_of: Mapping[str, int]
    size: int


def shards_of(jobs: Sequence[Job], max_shard_bytes: float) -> list[Shard]:
    """The files that hold the tensors in their order; a tensor is in one file, however large."""
    groups: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        if groups[-1] and held + job.bytes_to_write > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(job)
        held += job.bytes_to_write
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, jobs: Sequence[Job]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for job in jobs:
        places[job.name] = end
        header[job.name] = {
            "dtype": _CODE_OF[job.dtype],
            "shape": list(job.shape),
            "data_offsets": [end, end + job.bytes_to_write],
        }
        end += job.bytes_to_write
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8, as the library writes it
    encoded = struct.pack("<Q", len(text)) + text
    return Shard(name, tuple(jobs), encoded, {key: len(encoded) + at for key, at in places.items()}, len(encoded) + end)


class OpenShard:
    """A file of the result that is being written; any number of threads may write."""

    def __init__(self, shard: Shard, partial: Path) -> None:
        self.shard, self._path = shard, partial / f"{shard.name}.partial"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, shard.size)  # a disk that is full says so now
            self._put(shard.header, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, job: Job, start: int, values: NDArray[Any]) -> None:
        """Elements of a tensor from `start`, in the storage type."""
        assert values.dtype == STORAGE[job.dtype] and start + values.size <= numel(job.shape)
        self._put(values.data.cast("B"), self.shard.offset_of[job.name] + start * values.itemsize)

    def finish(self) -> None:
        """All of it is written: it gets its name."""
        os.close(self._descriptor)
        os.replace(self._path, self._path.with_suffix(""))

    def abandon(self) -> None:
        """Something went wrong: nothing of it stays."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview, place: int) -> None:
        left = memoryview(data)
        while len(left):
            wrote = os.pwrite(self._descriptor, left, place)
            left, place = left[wrote:], place + wrote


def check_new(out: Path) -> None:
    """Refuse, by ValueError, a folder that holds something, or a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a new folder")


class PartialFolder:
    """Where a merge writes until it is through, beside `out`; a later one of the same digest goes on from there."""

    def __init__(self, out: Path, digest: str) -> None:
        self.out, self._digest = out, digest
        self.folder = out.with_name(f".{out.name}.partial")
        self._own = self.folder / _OWN
        self._lock = -1
        self._made: list[Path] = []  # folders above it that were not there

    def begin(self) -> None:
        """Make it, or take up what an earlier merge of the same left; ValueError while another one writes there."""
        self._made = [path for path in self.folder.parents if not path.exists()]
        self._own.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._own / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise ValueError(
                f"{self.out}: another merge is writing it now; wait for it, or give another folder"
            ) from None
        what = self._own / "digest"
        if not what.is_file() or what.read_text() != self._digest:
            self._clear()
            for path in self._own.glob("*.json"):
                path.unlink()
            what.write_text(self._digest)

    def report_of(self, shard: Shard) -> list[Any] | None:
        """What was noted of a shard that is finished; None for one that is not."""
        note = self._own / f"{shard.name}.json"
        path = self.folder / shard.name
        if not note.is_file() or not path.is_file() or path.stat().st_size != shard.size:
            return None
        return json.loads(note.read_text())

    def note(self, shard: Shard, reports: list[Any]) -> None:
        """Keep the reports of a shard's tensors; written before the shard gets its name."""
        text = json.dumps(reports)
        (self._own / f"{shard.name}.json.partial").write_text(text)
        os.replace(self._own / f"{shard.name}.json.partial", self._own / f"{shard.name}.json")

    def finish(self, layout: Layout, shards: Sequence[Shard]) -> None:
        """Write the index and what lies beside the weights, and give the folder its name."""
        self._clear({shard.name for shard in shards})
        shard_of = {job.name: shard.name for shard in shards for job in shard.jobs}
        if len(shards) > 1:
            total = sum(job.bytes_to_write for job in layout.jobs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
            _write_json(self.folder / INDEX, index)
        carry_over(layout, self.folder)
        layout.files(self.folder)
        shutil.rmtree(self._own)
        try:
            os.replace(self.folder, self.out)  # an empty folder gives way
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            for path in self.folder.iterdir():  # `out` is a mount point, which stays: all goes into it
                shutil.move(path, self.out / path.name)
            self.folder.rmdir()
        self.release()

    def _clear(self, keep: Collection[str] = ()) -> None:
        """Remove what is not of this merge: of one of another recipe, of one cut in other files."""
        for path in self.folder.iterdir():
            if path.is_dir() and path != self._own:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in keep:
                path.unlink()

    def release(self) -> None:
        """Let others write there."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Nothing of it stays, nor of the folders made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # somebody else wrote there too
            for path in self._made:
                path.rmdir()
        self.release()


def carry_over(layout: Layout, folder: Path) -> None:
    """Copy what the layout's model has beside weights; config.json states the dtype most elements are written in.

    transformers loads all in that one.
    """
    copy_beside(layout.copy_from, folder)
    elements: dict[str, int] = {}
    for job in layout.jobs:
        if np.issubdtype(STORAGE[job.dtype], np.floating) or job.dtype == "bfloat16":
            elements[job.dtype] = elements.get(job.dtype, 0) + numel(job.shape)
    config = {key: value for key, value in layout.config.items() if key != "auto_map"}  # its code is left behind
    if elements:
        config = _with_dtype(config, max(elements, key=lambda dtype: elements[dtype]))
    _write_json(folder / "config.json", config)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what a model has beside weights: configurations, tokenizer, templates, licence."""
    for path in [*source.iterdir(), *source.glob(f"{_TEMPLATES}/*.jinja")]:
        left = path.suffix in _LEFT_SUFFIXES or path.name in _LEFT_NAMES or path.name.startswith(".")
        if path.is_file() and not left and not path.name.endswith(".index.json"):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A model's configuration with its dtype, and that of the models within it (text_config), set.

    transformers 5 calls the key `dtype`, older ones `torch_dtype`: the one in use is kept, and where none is
    `dtype` is added.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = {**config, **dict.fromkeys(keys, dtype)}
    for key, value in config.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value) and "model_type" in value:
            changed[key] = _with_dtype(value, dtype)
    return changed


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
