"""Whether a tokenizer's files agree on which id is which token."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_files(tokenizer: Any, name: str) -> None:
    """Compare what a tokenizer's files say of its added and special tokens with the tokenizer as loaded.

    transformers mends files that disagree by giving out new ids, which the model has never seen, without a word. A
    tokenizer that was not loaded from a folder has no files and passes.

    Args:
        tokenizer: a fast `PreTrainedTokenizerBase`; its `name_or_path` is the folder it was loaded from.
        name: what to call it in an error.

    Raises:
        ValueError: a file gives a token another id than it has, or calls it special where another does not, or names a
            special token that no file gives an id.
    """
    folder = Path(tokenizer.name_or_path or "/nowhere")
    whole, config = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    if not whole:
        return
    declared = [("tokenizer.json", t["id"], t["content"], t["special"]) for t in whole.get("added_tokens", [])]
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        declared.append(("tokenizer_config.json", int(i), token["content"], token.get("special", False)))
    for content, i in _read(folder / "added_tokens.json").items():
        declared.append(("added_tokens.json", i, content, None))
    loaded = tokenizer.backend_tokenizer
    called_special: dict[str, bool] = {}
    for file, i, content, special in declared:
        if (actual := loaded.token_to_id(content)) != i:
            has = "has none" if actual is None else f"is loaded as {actual}"
            raise ValueError(f"{name}: {file} gives token {content!r} the id {i}, but it {has}; its files disagree")
        if special is not None and called_special.setdefault(content, special) != special:
            raise ValueError(
                f"{name}: tokenizer.json and tokenizer_config.json disagree on whether {content!r} ({i}) is special"
            )
    known = set(called_special) | _vocabulary(whole["model"]) | {content for _, _, content, _ in declared}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for role, content in _roles(_read(folder / file)):
            if content not in known:
                raise ValueError(f"{name}: {file} names {content!r} as {role}, which has no id in tokenizer.json")


def _vocabulary(model: dict) -> set[str]:
    """The pieces of a model as tokenizer.json holds it: a map to ids, or (Unigram) a list of pairs."""
    vocabulary = model.get("vocab") or {}
    return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}


def _roles(named: dict) -> Iterator[tuple[str, str]]:
    """(role, token) for every special token that a file names."""
    for role, value in named.items():
        if role in ("additional_special_tokens", "extra_special_tokens"):
            tokens = list(value.values()) if isinstance(value, dict) else list(value or ())
        else:
            tokens = [value] if role.endswith("_token") else []
        for token in tokens:
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and content:
                yield role, content


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
