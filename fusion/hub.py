"""Models by folder or hub id: found, checked, fingerprinted, loaded. No other file decides where a model is."""

import json
import os
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from fusion import cluster
from fusion.artifact import digest, file_digest, write_json
from fusion.config import Model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_OTHER_LAYOUTS = ["consolidated*", "original/*"]  # the same weights once more
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)


def locate(model: Model, key: str, weights: bool = True) -> Path:
    """The folder of a model, downloaded first where it is named by hub id.

    Args:
        key: the config key, for errors.
        weights: the weights are needed too.

    Raises:
        ValueError: no such folder or hub model, or one without config or safetensors weights.
    """
    folder = Path(model.model).expanduser()
    if not folder.is_dir():
        patterns = [*_PATTERNS, *(["*.py"] if model.trust_remote_code else [])]
        folder = _download(model.model, key, [p for p in patterns if weights or p != "*.safetensors"])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {model.model} has no config.json; give the folder of a Hugging Face model")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        convert = "pickled weights, which are not read; convert them with save_pretrained"
        instead = f"only {convert}" if pickles else "no weights"
        if not Path(model.model).expanduser().is_dir():  # nothing else was downloaded
            instead = f"no weights, or only {convert}"
        raise ValueError(f"{key}: {model.model} has {instead} (*.safetensors)")
    index = folder / "model.safetensors.index.json"
    sharded = index.is_file() and not (folder / "model.safetensors").is_file()  # else an index is an older one's
    try:
        json.loads((folder / "config.json").read_text())
        shards = json.loads(index.read_text())["weight_map"].values() if weights and sharded else ()
    except (ValueError, KeyError) as error:
        raise ValueError(f"{key}: {model.model} has a damaged config.json or index ({error})") from None
    for shard in sorted(set(shards)):
        if not (folder / shard).is_file():
            raise ValueError(f"{key}: {model.model} lacks {shard}, which its index names; download it again")
    return folder


def _download(name: str, key: str, patterns: list[str]) -> Path:
    if not _HUB_ID.match(name) or name.count("/") > 1:
        raise ValueError(f"{key}: {name} is no folder here and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else " ".join(str(error).split())[:120]
        raise ValueError(f"{key}: {name} is no folder here and could not be had from the hub ({why})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors here that are a model's weights: that of the usual name, else those of its index, else all.

    Sorted. So they are read, too; others beside them are the same in another layout (`consolidated.safetensors`).
    """
    alone, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if alone.is_file():
        return [alone]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError):  # refused by `locate` where the weights are needed
        return []
    return sorted(folder / name for name in named if (folder / name).is_file())


def fingerprint(folder: Path, memory: Path) -> dict[str, str]:
    """Digests of a model's tokenizer and weights (config included).

    Hashes are remembered in the JSON file `memory` by path, size and time of change: a large model is read once.
    """
    tokenizer = sorted(p for pattern in _TOKENIZER_FILES for p in folder.glob(pattern))
    weights = [*weight_files(folder), folder / "config.json", *sorted(folder.glob("*.py"))]
    return {"tokenizer": _hash_all(folder, tokenizer, memory), "weights": _hash_all(folder, weights, memory)}


def _hash_all(folder: Path, paths: list[Path], memory: Path) -> str:
    """Digest of a folder's files by name (of several of one name by path) and content.

    A file's own is remembered while its size and time of change stay.
    """
    remembered: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    known, hashes = dict(remembered), {}
    names = Counter(path.name for path in paths)
    for path in paths:
        stat = path.stat()
        tag = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if tag not in known:
            known[tag] = file_digest(path)
        hashes[path.name if names[path.name] == 1 else path.relative_to(folder).as_posix()] = known[tag]
    if known != remembered:
        write_json(memory, known)
    return digest(hashes)


def load_tokenizer(model: Model, folder: Path) -> Any:
    """The model's fast tokenizer, as its tokenizer.json has it.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return _as_written(AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code), folder)
    except Exception as error:  # a missing or broken tokenizer surfaces as anything from OSError to a Rust exception
        raise ValueError(
            f"{model.name}: no tokenizer could be loaded from {folder}: {' '.join(str(error).split())[:160]}"
        ) from error


def settle_tokenizer(model: Model, folder: Path) -> bool:
    """Name a class in a checkpoint by which AutoTokenizer reads as tokenizer.json says, where it would not.

    Returns:
        Whether it does now: transformers overrules the name for some types of models.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def settled() -> bool:
        return type(AutoTokenizer.from_pretrained(folder)) is PreTrainedTokenizerFast

    wanted, path = load_tokenizer(model, folder), folder / "tokenizer_config.json"
    if type(wanted) is not PreTrainedTokenizerFast or settled():
        return True
    settings = json.loads(path.read_text()) if path.exists() else {}
    special = {role: token for role in _ROLES if (token := getattr(wanted, role)) is not None}
    write_json(path, {**special, **settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    return settled()


_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# what tokenizers cut in different ways: digits, contractions, runs of spaces, lines, scripts, marks that compose
_PROBES = (
    "Hello  world! It's 12345 + 67,890.5, and they'LL DON'T stop",
    "\n\n\t  def f(x_1):\n\n    return x!=y2;   # ok\r\n",
    " 中文字符、日本語 한국어 Русский العربية 🙂👍🏽 e\u0301 ﬁ ½ naïve ",
)


def _as_written(loaded: Any, folder: Path) -> Any:
    """A tokenizer, or one that reads as tokenizer.json says where this one does not.

    transformers 5 builds many tokenizers anew by the class that a model names, with that class's way to cut words: one
    that calls itself GPT2Tokenizer and cuts in another way, as DBRX's does, would be read as GPT-2's.
    """
    from transformers import PreTrainedTokenizerFast

    own = type(loaded).__module__.startswith("transformers.") and type(loaded) is not PreTrainedTokenizerFast
    if not own or not isinstance(loaded, PreTrainedTokenizerFast) or not (folder / "tokenizer.json").is_file():
        return loaded
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = written.get_vocab()
    if vocabulary == loaded.get_vocab() and _probed(loaded) == _probed(written):
        return loaded
    for role in _ROLES:  # which the class may know alone
        if getattr(written, role) is None and (token := getattr(loaded, role)) in vocabulary:
            setattr(written, role, token)
    return written


def _probed(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]


def template_of(model: Model) -> str:
    """What `Renderer` takes as its template: the text of the Jinja file where the config names one."""
    if model.template in ("own", "plain"):
        return model.template
    path = Path(model.template)
    if not path.is_file():
        raise ValueError(f"{model.name}.template: {model.template} is no file; give own, plain or a Jinja file")
    return path.read_text()


def context_of(folder: Path) -> int | None:
    """How many tokens the model reads at once, None where its config sets no bound."""
    settings = json.loads((folder / "config.json").read_text())
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"):
        for level in (settings, settings.get("text_config") or {}):
            if isinstance(level.get(name), int):
                return int(level[name])
    return None


def load_model(model: Model, folder: Path, dtype: str | None = None) -> Any:
    """The model with its causal language head, in evaluation mode on the CPU.

    Raises:
        ValueError: transformers cannot make a causal language model of the folder.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, cluster.precision(dtype or model.dtype)),
            attn_implementation=None if model.attention == "auto" else model.attention,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        known = (ValueError, OSError, KeyError, ImportError, RuntimeError, SafetensorError)
        if not model.trust_remote_code and not isinstance(error, known):
            raise  # a bug of ours; a model's own code raises what it likes
        raise ValueError(
            f"{model.name}: {folder} does not load as a causal language model: {' '.join(str(error).split())[:200]}"
        ) from error
    loaded, info = made
    if info["missing_keys"]:
        raise ValueError(f"{model.name}: {folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    return loaded.eval()


def fingerprint_data(data: str, memory: Path) -> str:
    """What identifies a dataset: the digest of a file's bytes, of a folder's files, or a hub id as it is."""
    path = Path(data).expanduser()
    if path.is_file():
        return _hash_all(path.parent, [path], memory)
    if path.is_dir():
        return _hash_all(path, [p for p in sorted(path.rglob("*")) if p.is_file()], memory)
    return f"hub:{data}"


def count_parameters(folder: Path) -> int:
    """Weights in a folder's safetensors, counted from their headers.

    Raises:
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, "np") as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged ({error}); download it again") from None
    return count
