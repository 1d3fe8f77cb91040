"""What to merge: a recipe in our own YAML, or in mergekit's plain form, read strictly.

method: sce                        merge_method: sce
base: path/or/hub-id               base_model: path/or/hub-id
models: [target-a, target-b]       models: [{model: target-a}, {model: target-b}]
parameters: {tau: 0.1}             parameters: {select_topk: 0.1}
dtype: bfloat16                    dtype: bfloat16
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusion.merge.methods import get_method

DTYPE_NAMES = ("float32", "bfloat16", "float16")
# What can matter of a model on the hub: no pickles, no code.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]

_OUR_KEYS = ("method", "base", "models", "parameters", "dtype")
_MERGEKIT_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
# mergekit's parameters by method, with our names for them. `int8_mask` is how it stores masks in memory and
# changes no number; ours take a byte always.
_MERGEKIT_PARAMETERS: dict[str, dict[str, str | None]] = {
    "linear": {"weight": "weights", "normalize": "normalize"},
    "task_arithmetic": {"weight": "weights", "normalize": "normalize", "lambda": "scale", "int8_mask": None},
    "sce": {"select_topk": "tau", "int8_mask": None},
}
# What holds where a mergekit recipe is silent; its defaults are not always ours.
_MERGEKIT_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False},
    "sce": {"tau": 1.0, "definition": "mergekit"},
}


@dataclass(frozen=True)
class MergeRecipe:
    """What to merge and how; `base` and `models` are local checkpoint folders when the engine sees them.

    `dtype` is that of the tensors written: float32, bfloat16, float16, or None for that of each of the base's
    tensors (of the first model's where there is no base). Raises ValueError for no models or another dtype.
    """

    method: str
    base: str | None
    models: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: there are none to merge; name at least one")
        _dtype("dtype", self.dtype)


def load_recipe(path: str | Path) -> MergeRecipe:
    """Read a recipe, find its models: folders (relative to the recipe or the working directory) or hub ids.

    A recipe with `merge_method` is mergekit's, one with `method` ours. Everything in it is understood or
    refused: raises ValueError, one line that names the file, the key and what would do.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        if not isinstance(content, dict):
            raise ValueError("holds no keys; a recipe has `method`, `models` and more")
        recipe = _from_mergekit(content) if "merge_method" in content else _from_ours(content)
        folders = (path.parent, Path())
        base = recipe.base and resolve_model(recipe.base, folders)
        models = tuple(resolve_model(model, folders) for model in recipe.models)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such recipe") from error
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return MergeRecipe(recipe.method, base, models, recipe.parameters, recipe.dtype)


def resolve_model(model: str, folders: tuple[Path, ...] = (Path(),)) -> str:
    """The folder of a model: `model` in the first of `folders` that has it, else a snapshot from the hub.

    `name@revision` asks the hub for a revision; HF_HUB_OFFLINE keeps to what was downloaded before. Raises
    ValueError for what is neither.
    """
    for folder in folders:
        if (folder / model).is_dir():
            return str((folder / model).resolve())
    name, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"model {model!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=_WANTED)
    except (OSError, ValueError) as error:
        # The hub's own messages run over many lines; what it was stays in the chain of exceptions.
        reason = type(error).__name__
        raise ValueError(f"model {model!r} is no folder and cannot be had from the hub ({reason})") from error


def _from_ours(content: dict[str, Any]) -> MergeRecipe:
    _refuse_unknown(content, _OUR_KEYS)
    models = content.get("models")
    if not isinstance(models, list):
        raise ValueError(f"models: {models!r} must be a list of folders or hub ids")
    parameters = _mapping("parameters", content.get("parameters"))
    return MergeRecipe(
        _text("method", content.get("method")),
        None if content.get("base") is None else _text("base", content["base"]),
        tuple(_text("models", model) for model in models),
        parameters,
        _dtype("dtype", content.get("dtype")),
    )


def _from_mergekit(content: dict[str, Any]) -> MergeRecipe:
    """mergekit's meaning in our words.

    Its base, where it is among the models, has no update and is left out; for a method without a base it is a
    model like the others, and the one whose configuration is kept.
    """
    _refuse_unknown(content, _MERGEKIT_KEYS)
    method = _text("merge_method", content["merge_method"])
    if method not in _MERGEKIT_PARAMETERS:
        raise ValueError(f"merge_method: {method!r} must be one of {', '.join(_MERGEKIT_PARAMETERS)}")
    base = None if content.get("base_model") is None else _text("base_model", content["base_model"])
    names, own = _mergekit_models(content.get("models"), method)
    if get_method(method).needs_base:
        own = [given for name, given in zip(names, own, strict=True) if name != base]
        names = [name for name in names if name != base]
    elif base is not None and base not in names:
        raise ValueError(f"base_model: {base!r} must be among the models, for {method} has no base")

    shared = _mergekit_parameters("parameters", content.get("parameters"), method)
    weights = [given.get("weights", shared.get("weights")) for given in own]
    parameters = {
        **_MERGEKIT_DEFAULTS[method],
        **{key: value for key, value in shared.items() if key != "weights"},
    }
    if "weight" in _MERGEKIT_PARAMETERS[method]:
        if None in weights:
            raise ValueError(f"models: {names[weights.index(None)]} has no weight, which {method} needs for each")
        parameters["weights"] = weights
    # mergekit computes in `dtype` and writes in `out_dtype`; we compute in more than float32 always.
    dtypes = [_dtype(key, content.get(key)) for key in ("out_dtype", "dtype")]
    return MergeRecipe(method, base, tuple(names), parameters, dtypes[0] or dtypes[1])


def _mergekit_models(models: Any, method: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of the models, and the parameters that each one sets for itself, by our names."""
    if not isinstance(models, list):
        raise ValueError(f"models: {models!r} must be a list of entries `model: …`")
    names, own = [], []
    for entry in models:
        entry = _mapping("models", entry)
        _refuse_unknown(entry, ("model", "parameters"), within="models: ")
        names.append(_text("model", entry.get("model")))
        given = _mergekit_parameters(f"models: {names[-1]}", entry.get("parameters"), method)
        if set(given) - {"weights"}:
            raise ValueError(f"models: {names[-1]}: only a weight can differ by model, not {_listed(given)}")
        own.append(given)
    return names, own


def _mergekit_parameters(where: str, parameters: Any, method: str) -> dict[str, Any]:
    """A block of mergekit's parameters by our names; gradients and filters (lists, mappings) are refused."""
    ours = _MERGEKIT_PARAMETERS[method]
    parameters = _mapping(where, parameters)
    _refuse_unknown(parameters, tuple(ours), within=f"{where}: {method}: ")
    for name, value in parameters.items():
        if isinstance(value, list | dict):
            raise ValueError(f"{where}: {name}: gradients and filters are not supported; give one value")
    return {key: value for name, value in parameters.items() if (key := ours[name]) is not None}


def _refuse_unknown(content: dict[str, Any], known: tuple[str, ...], within: str = "") -> None:
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ValueError(f"{within}{_listed(unknown)} not supported; known are {', '.join(known)}")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _dtype(key: str, value: Any) -> str | None:
    if value is not None and value not in DTYPE_NAMES:
        raise ValueError(f"{key}: {value!r} must be one of {', '.join(DTYPE_NAMES)}")
    return value


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {value!r} must be keys with values")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: {value!r} must be a name")
    return value


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML where a key comes once and `1e-4` is the number it is in YAML 1.2 (PyYAML reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
