"""Our own YAML for a recipe.

    method: ties
    base: path/or/hub-id
    models: [a, {model: b, parameters: {weights: 0.7}}, base+adapter]
    parameters: {density: [0.2, 0.5, 0.2], scale: {gradient: [0.5, 1]}}

`models` are names, or entries with parameters of that model alone; a setting (`fusion.merge.settings`) in `parameters`
holds for the others. `slices` in the place of `models` builds the result from layers:

    slices:
      - sources: [{model: a, layers: [0, 16]}, {model: b, layers: [8, 24], parameters: {weights: 0.7}}]
        base: {model: c, layers: [0, 16]}    # where it is not `base` at the layers of the first source
        parameters: {scale: 0.5}             # in the place of the recipe's
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fusion.merge.entries import (
    entries,
    flag,
    layer_range,
    mapping,
    optional_text,
    refuse_unknown,
    text,
    whole,
)
from fusion.merge.methods import Method, get_method
from fusion.merge.records import Lines, MergeRecipe, Output, Slice, Source, Tokenizer, TokenRow
from fusion.merge.settings import is_filters

_KEYS = (
    *("method", "base", "models", "parameters", "dtype", "seed", "statistics", "lines", "slices"),
    *("tokenizer", "chat_template", "output"),
)
_MODELS = "folders or hub ids"


def read(content: Mapping[str, Any]) -> MergeRecipe:
    """The recipe, its models by their names in the file; ValueError, one line, for what is not understood."""
    refuse_unknown(content, _KEYS)
    method = get_method(text("method", content.get("method")))
    shared = mapping("parameters", content.get("parameters"))
    if "models" in content and "slices" in content:
        raise ValueError("slices: they name their models themselves; leave out `models`")
    slices: tuple[Slice, ...] = ()
    if "slices" in content:
        listed = entries("slices", content["slices"], "entries `sources: ...`")
        slices = tuple(_slice(f"slices: {place}: ", entry, method, shared) for place, entry in enumerate(listed))
        models = tuple(dict.fromkeys(source.model for part in slices for source in part.sources))
        shared = {}
    else:
        models, own = _models(content.get("models"))
        shared = _by_model(method, shared, own)
    return MergeRecipe(
        method.name,
        optional_text("base", content.get("base")),
        models,
        shared,
        content.get("dtype"),
        seed=content.get("seed", 0),
        statistics=_statistics(content.get("statistics")),
        lines=_lines(content.get("lines")),
        slices=slices,
        tokenizer=read_tokenizer(content.get("tokenizer")),
        chat_template=optional_text("chat_template", content.get("chat_template")),
        output=_output(content.get("output")),
    )


def read_tokenizer(value: Any) -> Tokenizer | None:
    """A block `tokenizer`, which mergekit has in the same form."""
    if value is None:
        return None
    content = mapping("tokenizer", value)
    refuse_unknown(content, ("source", "tokens", "pad_to_multiple_of"), "tokenizer: ")
    tokens = mapping("tokenizer: tokens", content.get("tokens"))
    padded = content.get("pad_to_multiple_of")
    return Tokenizer(
        reference("tokenizer: source", content.get("source", "union")),
        {token: _token_row(f"tokenizer: tokens: {token}: ", entry) for token, entry in tokens.items()},
        None if padded is None else whole("tokenizer: pad_to_multiple_of", padded, 1),
    )


def reference(key: str, value: Any) -> str:
    """A model by name: `NAME`, `NAME@REVISION`, `NAME+ADAPTER`; also mergekit's {model: ..., lora: ...} in full."""
    if not isinstance(value, dict):
        return text(key, value)
    refuse_unknown(value, ("model", "lora"), f"{key}: ")
    model = _path(f"{key}: model", value.get("model"))
    return model if value.get("lora") is None else f"{model}+{_path(f'{key}: lora', value['lora'])}"


def _path(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return text(key, value)
    refuse_unknown(value, ("path", "revision"), f"{key}: ")
    path, revision = text(f"{key}: path", value.get("path")), optional_text(f"{key}: revision", value.get("revision"))
    return path if revision is None else f"{path}@{revision}"


def _models(value: Any) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The models' names, and the parameters that each has for itself."""
    if not isinstance(value, list):
        raise ValueError(f"models: {value!r} must be a list of {_MODELS}")
    names, own = [], []
    for entry in value:
        given: dict[str, Any] = {}
        if isinstance(entry, dict) and not set(entry) & {"lora"}:
            refuse_unknown(entry, ("model", "parameters"), "models: ")
            given = mapping(f"models: {entry.get('model')}: parameters", entry.get("parameters"))
            entry = entry.get("model")
        names.append(reference("models", entry))
        own.append(given)
    return tuple(names), own


def _slice(where: str, value: Any, method: Method, shared: Mapping[str, Any]) -> Slice:
    content = mapping(where.rstrip(": "), value)
    refuse_unknown(content, ("sources", "base", "parameters"), where)
    sources, own = [], []
    for entry in entries(f"{where}sources", content.get("sources"), "entries {model: ..., layers: [first, end]}"):
        entry = mapping(f"{where}sources", entry)
        refuse_unknown(entry, ("model", "layers", "parameters"), f"{where}sources: ")
        sources.append(_source(f"{where}sources", entry))
        own.append(mapping(f"{where}sources: parameters", entry.get("parameters")))
    base = None
    if content.get("base") is not None:
        entry = mapping(f"{where}base", content["base"])
        refuse_unknown(entry, ("model", "layers"), f"{where}base: ")
        base = _source(f"{where}base", entry)
    parameters = {**shared, **mapping(f"{where}parameters", content.get("parameters"))}
    return Slice(tuple(sources), _by_model(method, parameters, own), base)


def _source(key: str, entry: Mapping[str, Any]) -> Source:
    return Source(reference(key, entry.get("model")), layer_range(f"{key}: layers", entry.get("layers")))


def _by_model(method: Method, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters, with a list for each that some model has for itself; the others keep what they share."""
    merged, types = dict(shared), method.fields()
    defaults = {item.name: item.default for item in dataclasses.fields(method.module.Parameters)}
    able = [name for name, kind in types.items() if tuple[float, ...] in (kind, *typing.get_args(kind))]
    for key in dict.fromkeys(key for given in own for key in given):
        if key not in able:
            raise ValueError(
                f"models: {key!r} cannot differ by model in {method.name}; what can is {able or 'nothing'}"
            )
        default: Any = defaults[key]
        common: Any = shared[key] if key in shared else default[0] if default else None
        apart = isinstance(common, list | tuple) and not is_filters(common)
        if apart and len(common) != len(own):
            raise ValueError(f"{key}: {common!r} has {len(common)} entries for {len(own)} models; give one for each")
        merged[key] = [given.get(key, common[place] if apart else common) for place, given in enumerate(own)]
        if None in merged[key]:
            raise ValueError(f"models: number {merged[key].index(None) + 1} has no {key}; give each of them one")
    return merged


def _statistics(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(text("statistics", name) for name in entries("statistics", value, "folders, one for each model"))


def _lines(value: Any) -> Lines | None:
    if value is None:
        return None
    content = mapping("lines", value)
    refuse_unknown(content, ("alpha", "beta", "outside"), "lines: ")
    return Lines(content.get("alpha", 1.0), content.get("beta", 0.0), content.get("outside"))


def _output(value: Any) -> Output:
    content = mapping("output", value)
    refuse_unknown(content, ("kind", "form", "rank", "density"), "output: ")
    for key, form in (("rank", "lora"), ("density", "ternary")):
        if key in content and content.get("form") != form:
            raise ValueError(f"output: {key}: {content[key]!r} is for form: {form}; leave it out, or set that form")
    return Output(**content)


def _token_row(where: str, value: Any) -> TokenRow:
    content = mapping(where.rstrip(": "), value)
    refuse_unknown(content, ("source", "force"), where)
    force, source = flag(f"{where}force", content.get("force", False)), content.get("source")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenRow(reference(f"{where}source", source), force=force)
    kind = source["kind"]
    if kind == "zero":
        refuse_unknown(source, ("kind",), f"{where}source: ")
        return TokenRow(force=force)
    if kind != "model_token":
        raise ValueError(f"{where}source: kind: {kind!r} must be zero or model_token")
    refuse_unknown(source, ("kind", "model", "token", "token_id"), f"{where}source: ")
    model = reference(f"{where}source: model", source.get("model"))
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise ValueError(f"{where}source: give one of `token` and `token_id`")
    if number is not None:
        return TokenRow(model, token_id=whole(f"{where}source: token_id", number, 0), force=force)
    return TokenRow(model, token=text(f"{where}source: token", token), force=force)
