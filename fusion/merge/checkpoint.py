"""Hugging Face checkpoint folders, read and written one tensor at a time; safetensors only."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# A new checkpoint takes everything of the old one but these: other weights, whatever could be executed, and
# what speaks of the old one alone (its manifest, its card, its training run).
_LEFT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"),
    *(".pkl", ".pickle", ".py", ".pyc", ".so", ".sh"),
}
_LEFT_NAMES = {"manifest.json", "README.md", "trainer_state.json", "all_results.json", "train_results.json"}
_TEMPLATES = "additional_chat_templates"  # the one subfolder of a tokenizer that transformers writes


class CheckpointReader:
    """The tensors of a checkpoint folder, by name, each read when asked for.

    Opening reads headers only, and checks that every tensor the index names is there. Raises ValueError, one
    line that names the folder and what would do, for a folder that is no safetensors checkpoint. Close it, or
    use `with`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give a Hugging Face checkpoint folder")
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
        self.config: dict[str, Any] = _read_json(self.folder / "config.json")
        self._files: dict[str, Any] = {}
        self._shard_of = self._locate()
        self.names: tuple[str, ...] = tuple(sorted(self._shard_of))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header; ValueError for one that cannot be merged."""
        code = self._file(name).get_slice(name).get_dtype()
        if code not in DTYPES:
            raise ValueError(f"{self.folder}: {name} is stored as {code}; known are {', '.join(DTYPES)}")
        return DTYPES[code]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, in its stored dtype."""
        return self._file(name).get_tensor(name)

    def close(self) -> None:
        """Let go of the files; the reader is of no use afterwards."""
        self._files.clear()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, name: str) -> Any:
        return self._files[self._shard_of[name]]

    def _locate(self) -> dict[str, str]:
        """The file of each tensor; a single file goes before an index, as it does in transformers."""
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE), SINGLE)
        if not (self.folder / INDEX).is_file():
            raise ValueError(self._no_weights())
        index = _read_json(self.folder / INDEX)
        shard_of = index.get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise ValueError(f"{self.folder}: {INDEX} has no weight_map of tensors to shards; download it again")
        for shard in sorted(set(shard_of.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{self.folder}: {INDEX} names the shard {shard!r}, not a file of this folder")
            if not (self.folder / shard).is_file():
                raise ValueError(f"{self.folder}: shard {shard} is named in {INDEX} but absent; download it again")
            absent = {name for name, place in shard_of.items() if place == shard} - self._open(shard)
            if absent:
                raise ValueError(f"{self.folder}: {INDEX} names {min(absent)}, missing in {shard}; download it again")
        return shard_of

    def _open(self, shard: str) -> set[str]:
        """Open a shard and keep it; the names it holds."""
        try:
            self._files[shard] = safe_open(self.folder / shard, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.folder}: {shard} cannot be read ({error}); download it again") from error
        return set(self._files[shard].keys())

    def _no_weights(self) -> str:
        if any(self.folder.glob("adapter_model.*")):
            return f"{self.folder} holds an adapter, not a model; merge it into its base model and save that"
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]
        if pickles:
            return (
                f"{self.folder} has only pickled weights ({min(pickles)}), which are never loaded; "
                "convert them: AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y)"
            )
        return f"{self.folder} has no safetensors weights; there must be a {SINGLE} or a {INDEX}"


class CheckpointWriter:
    """Writes a checkpoint that transformers loads, from tensors that come one at a time.

    Tensors are held until a shard of `max_shard_bytes` is full, so that much memory is in use. A disk that is
    full is an OSError; what lies in the folder is then of no use and the caller's to remove.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: float = 5e9) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._max_shard_bytes = max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._numel_of: dict[torch.dtype, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, in the dtype it is to have on disk."""
        assert name not in self._held and not any(name in shard for shard in self._shards), f"{name} came twice"
        if self._held and self._held_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._held[name] = tensor.detach().contiguous()
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        if tensor.is_floating_point():
            self._numel_of[tensor.dtype] = self._numel_of.get(tensor.dtype, 0) + tensor.numel()

    def finish(self, copy_from: str | Path) -> list[str]:
        """Write what is left, the index, and what `copy_from` has beside weights; returns all file names.

        config.json states the dtype that most elements were written in; transformers loads all in that one.
        """
        self._flush()
        count = len(self._shards)
        shard_of = {}
        for number, names in enumerate(self._shards, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._unnamed(number), self.folder / file)
            shard_of.update(dict.fromkeys(names, file))
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(shard_of.items())),
            }
            _write_json(self.folder / INDEX, index)
        self._carry_over(Path(copy_from))
        for file in set(shard_of.values()):
            # safetensors lets only the owner read; a checkpoint is for whom the user's umask says.
            shutil.copymode(self.folder / "config.json", self.folder / file)
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def _unnamed(self, number: int) -> Path:
        """A shard's place until the number of shards, a part of its name, is known."""
        return self.folder / f"shard-{number:05d}.partial"

    def _flush(self) -> None:
        """Write the tensors held as the next shard."""
        if not self._held and self._shards:
            return
        path = self._unnamed(len(self._shards) + 1)
        try:
            save_file(self._held, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library hides the system's error number in its text; a full disk must be known as one.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _carry_over(self, source: Path) -> None:
        for path in [*source.iterdir(), *source.glob(f"{_TEMPLATES}/*.jinja")]:
            left = path.suffix in _LEFT_SUFFIXES or path.name in _LEFT_NAMES or path.name.startswith(".")
            if path.is_file() and not left and not path.name.endswith(".index.json"):
                target = self.folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        config = _read_json(source / "config.json")
        if self._numel_of:
            config = _with_dtype(config, max(self._numel_of, key=lambda dtype: self._numel_of[dtype]))
        _write_json(self.folder / "config.json", config)


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A model's configuration with its dtype, and that of the models within it (text_config), set.

    transformers 5 calls the key `dtype`, older ones `torch_dtype`: the one in use is kept, and where none is
    `dtype` is added.
    """
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = {**config, **dict.fromkeys(keys, name)}
    for key, value in config.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value) and "model_type" in value:
            changed[key] = _with_dtype(value, dtype)
    return changed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object; download it again")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
