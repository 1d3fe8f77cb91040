"""Whether the tensors of several checkpoints are the same ones: names, shapes, types; heads tied in some of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.merge.jobs import MERGEABLE, STORAGE, Checkpoint, View, numel
from fusion.merge.layers import Layers

_AT_ONCE = 1 << 22  # elements compared


class Model:
    """An opened model of a recipe, its names and layers at hand."""

    def __init__(self, spec: str, checkpoint: Checkpoint) -> None:
        self.spec, self.checkpoint = spec, checkpoint
        self.names = frozenset(checkpoint.names)

    def leave_out_copies(self) -> None:
        """Leave out a head that is stored although the configuration ties it to the embedding, and is its copy.

        Merged by itself it could come out as another one, by drawn elements or filters; written once, it stays tied.
        """
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        if any(part.get("tie_word_embeddings") is True for part in parts):
            heads = [name for name in self.names if "head" in name or "embed_out" in name]
            self.names -= {name for name in heads if self.is_embedding_again(name)}

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration."""
        return self.checkpoint.config

    @cached_property
    def layers(self) -> Layers:
        """Its layers."""
        return Layers(self.names, self.config)

    @cached_property
    def by_layer(self) -> list[dict[str, str]]:
        """Of a model with one stack: each layer's tensors, what follows its number in their names, and their names.

        ValueError for a model with several.
        """
        prefix, count = self.layers.only(self.spec)
        found: list[dict[str, str]] = [{} for _ in range(count)]
        for name in sorted(self.names):
            place = self.layers.place(name)
            if place is not None:
                found[place.layer][name.removeprefix(f"{prefix}{place.layer}")] = name
        return found

    @cached_property
    def outside(self) -> list[str]:
        """Its tensors outside of layers."""
        return sorted(name for name in self.names if self.layers.place(name) is None)

    @cached_property
    def tied(self) -> list[str]:
        """The tensors with a row for each id, if the head may be tied to one of them."""
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        if any(part.get("tie_word_embeddings") is False for part in parts):
            return []
        rows = vocabulary_rows(self.config)
        shapes = {name: self.checkpoint.view(name).shape for name in self.names}
        return [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == rows]

    def view(self, name: str) -> View:
        """A tensor; for a head that is tied to the embedding and therefore not stored, the embedding."""
        return self.checkpoint.view(name if name in self.names else self.tied[0])

    def ties(self, name: str, reference: Model) -> bool:
        """Whether a tensor that is not here is a head in `reference`, which is tied to the embedding here."""
        shape = reference.view(name).shape
        head = len(shape) == 2 and shape[0] == vocabulary_rows(reference.config)
        return head and len(self.tied) == 1 and self.view(self.tied[0]).shape[1:] == shape[1:]

    def is_embedding_again(self, name: str) -> bool:
        """Whether a tensor is, bit for bit, another one with a row for each id."""
        view = self.view(name)
        if len(view.shape) != 2 or view.shape[0] != vocabulary_rows(self.config):
            return False
        return any(_same(view, self.view(other)) for other in self.names if other != name)


def check_names(reference: Model, wanted: Mapping[str, str], other: Model, theirs: Collection[str]) -> None:
    """ValueError unless `other` has what the reference has, and no more.

    `wanted`: the reference's names, with what `other` calls them; `theirs`: those of its names that are in question.
    A head that is the embedding again may be stored in one and left out in the other.
    """
    absent, untied = _apart(reference, wanted, other, theirs)
    if absent:
        raise ValueError(
            f"{other.folder} has no {_some(absent)}, which {reference.folder} has; merge models of one architecture"
        )
    if untied:
        raise ValueError(
            f"{other.folder} has {_some(untied)}, which {reference.folder} has not and which is no copy "
            "of the embedding; merge models of one architecture, with heads tied in all or in none"
        )


def same_tensors(one: Model, other: Model) -> bool:
    """Whether both have a row for each id of as many, and tensors of the same names, a head apart that is tied."""
    if vocabulary_rows(one.config) != vocabulary_rows(other.config):
        return False
    return not any(_apart(one, {name: name for name in one.names}, other, other.names))


def _apart(
    reference: Model, wanted: Mapping[str, str], other: Model, theirs: Collection[str]
) -> tuple[list[str], list[str]]:
    """What `other` lacks, and what it has that the reference has not."""
    absent = sorted(own for name, own in wanted.items() if own not in other.names and not other.ties(name, reference))
    extra = sorted(set(theirs) - set(wanted.values()))
    return absent, [name for name in extra if not other.is_embedding_again(name)]


def leave_out_buffers(models: Sequence[Model]) -> None:
    """Leave out what older versions of transformers stored and today's do not, unless all of the models have it.

    Rotary frequencies and causal masks: computed from the configuration, never read.
    """
    common = frozenset.intersection(*(model.names for model in models))
    for model in models:
        model.names -= {name for name in model.names - common if _is_buffer(name, model)}


def _is_buffer(name: str, model: Model) -> bool:
    if name.endswith((".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")):
        return True
    return name.endswith((".attn.bias", ".attention.bias")) and len(model.checkpoint.view(name).shape) == 4


def check_alike(views: Sequence[View]) -> bool:
    """Whether tensors of one name are weights to merge; False for others, which are the same in all and are copied.

    ValueError for shapes or types that differ, types that cannot be merged, and whole numbers that differ.
    """
    first = views[0]
    for view in views:
        if view.shape != first.shape:
            raise ValueError(
                f"{first.source} has shape {first.shape} and {view.source} has {view.shape}; "
                "merge models of one architecture"
            )
        if _floating(view) != _floating(first) or (_floating(view) and view.dtype not in MERGEABLE):
            raise ValueError(
                f"{view.source} is {view.dtype}; weights must be float32, bfloat16 or float16: "
                "dequantize or convert that model"
            )
    if _floating(first):
        return True
    for view in views[1:]:
        if not _same(first, view):
            raise ValueError(
                f"{first.source} ({first.dtype}) differs from {view.source}; only floating weights can be merged"
            )
    return False


def vocabulary_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding as the configuration, or its part for the language model, states them."""
    if "vocab_size" in config:
        return config["vocab_size"]
    parts = [part for part in config.values() if isinstance(part, dict)]
    stated = [part["vocab_size"] for part in parts if "vocab_size" in part]
    if stated:
        return stated[0]
    kind = (config.get("text_config") or {}).get("model_type")
    return _rows_by_default(kind) if kind else None


@cache
def _rows_by_default(model_type: str) -> int | None:
    """What transformers takes where a wrapper's configuration leaves it out, as Gemma 3's does."""
    from transformers import CONFIG_MAPPING  # takes seconds, and few need it

    return getattr(CONFIG_MAPPING[model_type](), "vocab_size", None) if model_type in CONFIG_MAPPING else None


def _same(one: View, other: View) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    count = numel(one.shape)
    for start in range(0, count, _AT_ONCE):
        ours: NDArray[Any] = np.empty(min(_AT_ONCE, count - start), STORAGE[one.dtype])
        theirs = np.empty_like(ours)
        one.read(start, ours)
        other.read(start, theirs)
        if ours.tobytes() != theirs.tobytes():
            return False
    return True


def _floating(view: View) -> bool:
    return view.dtype.startswith(("float", "bfloat"))


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
