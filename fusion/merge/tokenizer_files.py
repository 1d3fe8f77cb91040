"""A tokenizer's files: its tokens with their ids, as the JSON states them, and a tokenizer with more tokens."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.merge.checkpoint import read_json

BACKEND = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
# Where the tokens are once more, in older forms, which would be out of date beside a tokenizer with more tokens.
_OLDER = ("added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", *_OLDER)
_FILES = (*_TOKENIZER, "chat_template*", "additional_chat_templates/*", "generation_config.json")
_SPECIALS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_NEVER = -1e9  # the score of a piece that is taken where nothing else is left


@dataclass(frozen=True)
class Vocabulary:
    """A folder's tokenizer: its two JSON files, the id of each token, and the tokens that are matched as they are.

    `added`: content to what tokenizer.json says of it. `absent`: special tokens that the settings name and that have
    no id, which transformers gives one when it loads the tokenizer.
    """

    folder: Path
    backend: dict[str, Any]
    settings: dict[str, Any]
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    absent: tuple[str, ...] = ()


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """A folder's tokenizer, None where there are no files of one.

    Raises ValueError, one line, for files that are damaged or that only their own code could read.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if (folder / BACKEND).is_file():
        backend = read_json(folder / BACKEND)
    elif _paths(folder, _TOKENIZER):
        backend = _converted(folder)
    else:
        return None
    try:
        ids = _learned(backend)
        added = {entry["content"]: entry for entry in backend.get("added_tokens", [])}
        for number, entry in settings.get("added_tokens_decoder", {}).items():
            added.setdefault(entry["content"], {"id": int(number), **_FLAGS, **entry})
        ids |= {content: int(entry["id"]) for content, entry in added.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: {BACKEND} is no tokenizer that is known here ({error!r})") from error
    named = dict.fromkeys(_named(settings))
    return Vocabulary(folder, backend, settings, ids, added, tuple(token for token in named if token not in ids))


def tokenizer_json(folder: Path) -> tuple[Path, Path]:
    """The two files that say it all, there or not."""
    return folder / BACKEND, folder / SETTINGS


def tokenizer_type(vocabulary: Vocabulary) -> str:
    """BPE, Unigram, WordPiece or WordLevel; an old file does not say, and is BPE then."""
    model = vocabulary.backend["model"]
    return model.get("type") or ("BPE" if "merges" in model else "WordPiece")


def can_hold_idle(vocabulary: Vocabulary) -> bool:
    """Whether tokens can be put in that no text is encoded to: not where the longest match in the vocabulary wins."""
    return tokenizer_type(vocabulary) in ("BPE", "Unigram")


def extended(vocabulary: Vocabulary, idle: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> Vocabulary:
    """The tokenizer with more tokens: learned ones of others, and ones that are matched as they are.

    Those learned by others come without the merges that made them: text is encoded as before, but for characters that
    had no token (and whole words, where the tokenizer looks those up before it merges), and all ids can be decoded.
    All tokens must have ids above the present ones, with none left out. Raises ValueError where the tokenizer cannot
    hold them.
    """
    ids = {**vocabulary.ids, **idle, **{entry["content"]: entry["id"] for entry in added}}
    backend = copy.copy(vocabulary.backend)
    model = backend["model"] = copy.copy(backend["model"])
    # All tokens go into the vocabulary: a token that is only added gets its id by its place in the list.
    if isinstance(model["vocab"], list):
        pieces = list(model["vocab"])
        for content, number in sorted(ids.items(), key=lambda item: item[1]):
            if number == len(pieces):
                pieces.append([content, _NEVER])
        model["vocab"] = pieces
    else:
        model["vocab"] = {**model["vocab"], **ids}
    everyone = {**vocabulary.added, **{entry["content"]: dict(entry) for entry in added}}
    backend["added_tokens"] = sorted(everyone.values(), key=lambda entry: entry["id"])
    settings = dict(vocabulary.settings)
    if "added_tokens_decoder" in settings:
        new = {str(entry["id"]): {"content": entry["content"], **_flags(entry)} for entry in added}
        settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **new}
    made = Vocabulary(vocabulary.folder, backend, settings, ids, everyone)
    _check_backend(made)
    return made


def added_token(content: str, number: int, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An entry of `added_tokens`, with the flags of another one."""
    return {"id": number, "content": content, **_flags(like or {})}


def check_tokenizer(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """ValueError where transformers gives a token of a changed vocabulary another id, beside such a config.json."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "config.json").write_text(json.dumps(config))
        write_tokenizer(vocabulary, out, changed=True)
        try:
            found = AutoTokenizer.from_pretrained(out, trust_remote_code=False).get_vocab()
        except Exception as error:  # a broken tokenizer surfaces as anything from OSError to a Rust exception
            why = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{vocabulary.folder}: its tokenizer cannot take the tokens of the others ({why})"
            ) from error
    _same(vocabulary, found, "transformers")


def write_tokenizer(vocabulary: Vocabulary, out: Path, changed: bool) -> None:
    """Put a tokenizer's files into `out` in the place of those that are there.

    `changed`: the vocabulary is not the one of its folder any more; a class of its own would not read it.
    """
    for path in _paths(out, _FILES):
        path.unlink()
    older = set(_paths(vocabulary.folder, _OLDER)) if changed else set()
    for path in _paths(vocabulary.folder, _FILES):
        if path not in older:
            target = out / path.relative_to(vocabulary.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if changed:
        (out / BACKEND).write_text(json.dumps(vocabulary.backend, ensure_ascii=False, indent=1), encoding="utf-8")
        settings = vocabulary.settings
        if "auto_map" in settings:
            settings = {key: value for key, value in settings.items() if key != "auto_map"}
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if settings:
            (out / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _paths(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _learned(backend: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of the model proper: a table, or in a Unigram model a list of pieces with scores."""
    vocab = backend["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece: number for number, (piece, _) in enumerate(vocab)}
    return {piece: int(number) for piece, number in vocab.items()}


def _named(settings: Mapping[str, Any]) -> list[str]:
    """The special tokens that tokenizer_config.json names, those of a class among them (CodeLlama's `fill_token`)."""
    found = [value for key, value in settings.items() if key.endswith("_token")]
    for key in _SPECIALS:
        several = settings.get(key) or []
        found += several.values() if isinstance(several, dict) else several
    texts = [token.get("content") if isinstance(token, dict) else token for token in found]
    return [text for text in texts if isinstance(text, str) and text]


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key, otherwise) for key, otherwise in _FLAGS.items()}


def _converted(folder: Path) -> dict[str, Any]:
    """The JSON of a tokenizer that is stored in an older form."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder)
        return json.loads(loaded.backend_tokenizer.to_str())
    except Exception as error:  # a broken tokenizer surfaces as anything from OSError to a Rust exception
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder}: its tokenizer cannot be read without {BACKEND} ({why})") from error


def _check_backend(vocabulary: Vocabulary) -> None:
    """ValueError unless the library reads every token with its id."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(json.dumps(vocabulary.backend)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises Exception itself
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{vocabulary.folder}: its tokenizer cannot hold the tokens of the others ({why})") from error
    _same(vocabulary, found, "the tokenizers library")


def _same(vocabulary: Vocabulary, found: Mapping[str, int], reader: str) -> None:
    if found != vocabulary.ids:
        both = found.keys() | vocabulary.ids.keys()
        token = min(token for token in both if found.get(token) != vocabulary.ids.get(token))
        raise ValueError(
            f"{vocabulary.folder}: with the tokens of the others, {reader} gives {token!r} the id "
            f"{found.get(token)} in the place of {vocabulary.ids.get(token)}; name another model as its source"
        )
