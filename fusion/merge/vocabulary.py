"""Different vocabularies, joined by token: each model's embedding is read in the order of one joined tokenizer.

Tokens are the same where they are the same string. A model that lacks a token reads the row of one that has it, by
mergekit's rules (0.1.4): that of the only model that has it; else the base's; else the mean of those that have it;
zeros where none has. Rows that no token has, padding among them, are the mean of the rows that some token has (Hewitt
2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.merge.correspond import vocabulary_rows
from fusion.merge.jobs import Checkpoint, View
from fusion.merge.rows import MEAN, REST, ZERO, Rows
from fusion.merge.tokenizer_files import (
    Vocabulary,
    added_token,
    can_hold_idle,
    check_tokenizer,
    extended,
    read_vocabulary,
    tokenizer_json,
    tokenizer_type,
    write_tokenizer,
)

REMEDY = "join them by token with `tokenizer: {source: union}`"
# what architectures call their embedding and their head, here and where their own code makes them
_MODULES = {
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "tok_embeddings",
    "embeddings",
    "tokens_embed",
    "shared",
}
_MODULES |= {"word_embedding", "input_embedding", "lm_head", "embed_out", "output", "output_layer"}
_MODULES |= {"output_projection", "head"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def same_vocabulary(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether all have the same number of rows, and those with a tokenizer give each token the same id."""
    return _difference(checkpoints) is None


def refuse_different(checkpoints: Sequence[Checkpoint]) -> None:
    """ValueError, one line that says what would do, where vocabularies differ."""
    if difference := _difference(checkpoints):
        raise ValueError(f"{difference}; {REMEDY}")


def join_vocabularies(
    settings: Any, checkpoints: Sequence[Checkpoint], base_index: int | None, specs: Sequence[str] = ()
) -> Joined | None:
    """The vocabularies of all models as one, or None with no settings and the same vocabulary everywhere.

    `settings`: None, or an object or mapping with `source` (union, base, or a model), `tokens` (token to a record with
    `model`, `token`, `token_id`, `force`) and `pad_to_multiple_of`, as `fusion.merge.recipe.Tokenizer`. A model is a
    number among `checkpoints`, or one of their names, `specs`. Raises ValueError, one line, for vocabularies that
    differ with no settings, tokens and rows that are not there, and a tokenizer that cannot hold all tokens.
    """
    if settings is None:
        refuse_different(checkpoints)
        return None
    names = list(specs) or [str(one.folder) for one in checkpoints]
    return Joined(_Settings.of(settings, names), checkpoints, base_index)


def _difference(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The first thing in which the vocabularies of two differ."""
    read = _read_all(checkpoints)
    first, rows = checkpoints[0], vocabulary_rows(checkpoints[0].config)
    for one in checkpoints[1:]:
        if vocabulary_rows(one.config) != rows:
            return f"{first.folder} has {rows} rows in its vocabulary, {one.folder} {vocabulary_rows(one.config)}"
    with_files = [vocabulary for vocabulary in read if vocabulary is not None]
    for other in with_files[1:]:
        ours, theirs = with_files[0].ids, other.ids
        if ours != theirs:
            token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            places = (f"{ids[token]}" if token in ids else "no token" for ids in (ours, theirs))
            return f"{token!r} is {next(places)} in {with_files[0].folder} and {next(places)} in {other.folder}"
    return None


def _read_all(checkpoints: Sequence[Checkpoint]) -> list[Vocabulary | None]:
    """The tokenizer of each, files of the same bytes once."""
    known: dict[tuple[bytes, ...], Vocabulary | None] = {}
    found = []
    for one in checkpoints:
        bytes_of = tuple(path.read_bytes() if path.is_file() else b"" for path in tokenizer_json(one.folder))
        key = bytes_of if bytes_of[0] else (str(one.folder).encode(),)
        if key not in known:
            known[key] = read_vocabulary(one.folder)
        found.append(known[key])
    return found


@dataclass(frozen=True)
class _Settings:
    """What was asked for, models by number."""

    source: str | int
    tokens: dict[str, dict[str, Any]]
    pad_to_multiple_of: int | None

    @classmethod
    def of(cls, given: Any, specs: Sequence[str]) -> _Settings:
        settings = _mapping(given)
        source = settings.get("source", "union")
        rows = {}
        for token, own in (settings.get("tokens") or {}).items():
            row = {"model": None, "token": None, "token_id": None, "force": False, **_mapping(own)}
            rows[token] = {**row, "model": None if row["model"] is None else _number(row["model"], specs)}
        source = source if source in ("union", "base") else _number(source, specs)
        return cls(source, rows, settings.get("pad_to_multiple_of"))


def _number(model: str | int, specs: Sequence[str]) -> int:
    if isinstance(model, str) and model not in specs:
        raise ValueError(f"tokenizer: {model!r} is no model of this merge; name one of {', '.join(specs)}")
    return model if isinstance(model, int) else specs.index(model)


def _mapping(given: Any) -> dict[str, Any]:
    return asdict(given) if is_dataclass(given) and not isinstance(given, type) else dict(given)


class Joined:
    """One vocabulary for all models; `view` gives a model's embedding in its order.

    `rows`: of the result's embedding; `tokens`: the id of each token; `digest`: of what decides the rows.
    """

    def __init__(self, settings: _Settings, checkpoints: Sequence[Checkpoint], base_index: int | None) -> None:
        self._settings, self._checkpoints, self._base = settings, checkpoints, base_index
        self._root = settings.source if isinstance(settings.source, int) else base_index or 0
        self._vocabularies = self._read()
        self._result, self._changed = self._join()
        self.tokens = self._result.ids
        count, multiple = max(self.tokens.values()) + 1, settings.pad_to_multiple_of or 1
        self.rows = -(-count // multiple) * multiple
        self._own = np.stack([self._rows_of(number) for number in range(len(checkpoints))])
        self._given, self._given_row, self._forced = self._defaults()
        if self._changed:
            check_tokenizer(self._result, self.config(checkpoints[self._root].config))

    @property
    def digest(self) -> str:
        """Of the joined tokens and of where the rows come from."""
        told = [sorted(self.tokens.items()), asdict(self._settings), self._base, self.rows]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def is_vocabulary(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
        """Whether a model's tensor has a row for each token: its embedding, its output head, or the head's bias."""
        module = name.split(".")[-2] if "." in name else name
        return len(shape) in (1, 2) and module in _MODULES and shape[0] == vocabulary_rows(config)

    def refuse_unknown(self, which: int, name: str, shape: tuple[int, ...]) -> None:
        """ValueError for a tensor outside of layers that is as long as the vocabulary, where rows would move."""
        rows = vocabulary_rows(self._checkpoints[which].config)
        other = any(part in name for part in ("pos", ".wpe.", "norm", ".ln_"))
        still = (
            self.rows == rows and (self._own[which] == np.where(self._own[which] < 0, -1, np.arange(self.rows))).all()
        )
        if rows in shape and not other and not still:
            raise ValueError(
                f"tokenizer: {name} of {self._checkpoints[which].folder} is {shape}, one as many as its vocabulary, "
                "and is no embedding or head that is known here; vocabularies of this architecture cannot be joined"
            )

    def view(self, which: int, name: str, view: View) -> View:
        """The tensor of a model, by its number, with the rows of the joined vocabulary; in its own type."""
        own = self._own[which]
        assert own.max(initial=-1) < view.shape[0], f"{name} has {view.shape[0]} rows"
        has = (own >= 0) & ~self._forced
        model = np.where(has, which, self._given)
        row = np.where(has, own, self._given_row)
        if self.rows == view.shape[0] and (model == which).all() and (row == np.arange(self.rows)).all():
            return view  # every row stays where it is
        averaged = (self._own[:, model == MEAN] >= 0).any(1)
        needed = {int(number) for number in (*np.unique(model[model >= 0]), *np.flatnonzero(averaged))}
        views = {number: view if number == which else self._donor(number, name, view) for number in sorted(needed)}
        shape = (self.rows, *view.shape[1:])
        return Rows(shape, view.dtype, f"{view.source}, joined", views, model, row, self._own)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the number of rows, and the special ids of the model whose tokenizer is the root."""
        changed, rows = dict(config), vocabulary_rows(config)
        if config.get("vocab_size") == rows:
            changed["vocab_size"] = self.rows
        for key, part in config.items():
            if isinstance(part, dict) and rows is not None and part.get("vocab_size") == rows:
                changed[key] = {**part, "vocab_size": self.rows}
        root = self._checkpoints[self._root].config
        for key in _IDS:
            if key in root:
                changed[key] = root[key]
            else:
                changed.pop(key, None)
        return changed

    def files(self, out: Path) -> None:
        """Write the joined tokenizer's files in the place of those in `out`."""
        write_tokenizer(self._result, out, self._changed)

    def _read(self) -> list[Vocabulary]:
        """Each model's tokenizer; a model without one has the root's, if it has as many rows."""
        found = _read_all(self._checkpoints)
        root, rows = found[self._root], vocabulary_rows(self._checkpoints[self._root].config)
        if root is None:
            raise ValueError(f"tokenizer: {self._checkpoints[self._root].folder} has no tokenizer files to begin with")
        for one, vocabulary in zip(self._checkpoints, found, strict=True):
            if vocabulary is None and vocabulary_rows(one.config) != rows:
                raise ValueError(f"tokenizer: {one.folder} has no tokenizer files, and other rows than {root.folder}")
        return [root if vocabulary is None else vocabulary for vocabulary in found]

    def _join(self) -> tuple[Vocabulary, bool]:
        """The root's tokenizer with the tokens that it must have besides; and whether there are any."""
        root = self._vocabularies[self._root]
        next_id = max(root.ids.values(), default=-1) + 1
        marked: dict[str, Mapping[str, Any]] = {token: {"special": True} for token in root.absent}
        learned: dict[str, None] = {}
        if self._settings.source == "union":
            for one, vocabulary in zip(self._checkpoints, self._vocabularies, strict=True):
                limit = vocabulary_rows(one.config) or len(vocabulary.ids)
                for token, number in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
                    if token in root.ids or number >= limit:
                        continue
                    if token in vocabulary.added:
                        marked.setdefault(token, vocabulary.added[token])
                    else:
                        learned[token] = None
        for token in self._settings.tokens:
            if token not in root.ids and token not in learned:
                marked.setdefault(token, {})
        learned = {token: None for token in learned if token not in marked}
        if learned and not can_hold_idle(root):
            raise ValueError(
                f"tokenizer: {root.folder} has a {tokenizer_type(root)} tokenizer, which cannot take the tokens that "
                "others learned; use `tokenizer: {source: base}`"
            )
        if not learned and not marked:
            return root, False
        idle = {token: next_id + place for place, token in enumerate(learned)}
        next_id += len(idle)
        added = [added_token(token, next_id + place, like) for place, (token, like) in enumerate(marked.items())]
        return extended(root, idle, added), True

    def _rows_of(self, number: int) -> NDArray[np.int64]:
        """A model's row for each of the result's; −1 where it has none."""
        ids, limit = self._vocabularies[number].ids, vocabulary_rows(self._checkpoints[number].config)
        own = np.full(self.rows, -1, np.int64)
        for token, place in self.tokens.items():
            row = ids.get(token, -1)
            if limit is None or row < limit:
                own[place] = row
        return own

    def _defaults(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Where a row comes from in a model that has none: a model or a code, its row, and whether all take it."""
        has = self._own >= 0
        count = has.sum(0)
        model = np.select([count == 0, count == 1], [ZERO, has.argmax(0)], MEAN).astype(np.int64)
        if self._base is not None:
            model[has[self._base]] = self._base
        free = np.ones(self.rows, bool)
        free[list(self.tokens.values())] = False
        model[free] = REST
        forced = np.zeros(self.rows, bool)
        row = np.take_along_axis(self._own, np.maximum(model, 0)[None], 0)[0]
        for token, given in self._settings.tokens.items():
            place = self.tokens[token]
            forced[place] = given["force"]
            model[place], row[place] = self._given_source(token, given)
        return model, row, forced

    def _given_source(self, token: str, given: Mapping[str, Any]) -> tuple[int, int]:
        """The row that the settings name for a token."""
        number, named, row = given["model"], given["token"] or token, given["token_id"]
        if number is None:
            return ZERO, 0
        folder, rows = self._checkpoints[number].folder, vocabulary_rows(self._checkpoints[number].config)
        what = f"token {named!r}" if row is None else f"row {row}"
        if row is None:
            row = self._vocabularies[number].ids.get(named, -1)
        if row < 0 or (rows is not None and row >= rows):
            raise ValueError(f"tokenizer: tokens: {token}: {folder} has no {what}; name one that it has")
        return number, row

    def _donor(self, number: int, name: str, view: View) -> View:
        """The tensor of another model that rows come from; its embedding where its head is tied to that."""
        one = self._checkpoints[number]
        names = [name] if name in one.names else list(one.names)
        found = [one.view(own) for own in names if self.is_vocabulary(own, one.view(own).shape, one.config)]
        if len(found) != 1 or found[0].shape[1:] != view.shape[1:]:
            shapes = ", ".join(str(other.shape) for other in found) or "none"
            raise ValueError(
                f"{view.source} is {view.shape}, and what {one.folder} has of its kind is {shapes}; "
                "vocabularies are joined where rows are of one width"
            )
        return found[0]
