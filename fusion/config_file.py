"""A config from its YAML file, strictly: any mistake is one line with the key, the value and what would do."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fusion.config import SAMPLERS, Align, Capture, Config


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text; users mean a number. It lets a key stand twice; users mean one of them."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if key.value != "<<" and keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config file and the `key=value` settings given beside it.

    Raises:
        ValueError: one line naming the file, the key, the value and what would do.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give --config an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds no keys; begin with `name:`, `pivot:`, `sources:`, `prepare:`")
    for override in overrides:
        _set(tree, override)
    try:
        packed = json.dumps(tree, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a date as a key, an alias that holds itself
        raise ValueError(f"{path}: is no plain tree of keys and values: {error}") from None
    try:
        config: Config = TypeAdapter(Config).validate_json(packed, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error, tree)}") from None
    _check_asked(config.capture, tree.get("capture") or {})
    _check_published(config.align, tree.get("align") or {})
    return config


def deepspeed(path: str) -> dict[str, Any]:
    """A DeepSpeed file.

    Raises:
        ValueError: it is missing or is no JSON object.
    """
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"distill.deepspeed: {path} cannot be read as JSON ({error}); configs/deepspeed holds examples"
        ) from None


def _check_asked(capture: Capture, given: dict) -> None:
    """A setting of another sampler would change nothing: who gives it means that sampler."""
    asked = SAMPLERS[capture.sampler]
    for key in sorted({key for keys in SAMPLERS.values() for key in keys} - set(asked)):
        if key in given:
            means = " or ".join(name for name, keys in SAMPLERS.items() if key in keys)
            raise ValueError(
                f"capture.{key}: {given[key]} will not do: sampler {capture.sampler} asks {', '.join(asked)} alone; "
                f"leave it away, or set capture.sampler to {means}"
            )


def _check_published(align: Align, given: dict) -> None:
    """A published procedure is one whole."""
    others = sorted(set(given) - {"procedure"})
    if align.procedure != "boundaries" and others:
        raise ValueError(
            f"align.{others[0]}: {given[others[0]]} will not do: procedure {align.procedure} asks no other setting; "
            "leave it away, or leave away procedure"
        )


def _set(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: write key=value, for example --set distill.epochs=3")
    try:
        setting = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: {value!r} is not YAML; put it in quotes if it is text") from None
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = (
            node[int(parent)] if isinstance(node, list) and _is_index(parent, node) else _child(node, parent, override)
        )
    if isinstance(node, list) and _is_index(last, node):
        node[int(last)] = setting
    elif isinstance(node, dict):
        node[last] = setting
    else:
        raise ValueError(f"--set {override}: {key} is not inside a section")


def _child(node: Any, key: str, override: str) -> Any:
    if not isinstance(node, dict):
        raise ValueError(f"--set {override}: {key!r} is not inside a section")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _is_index(text: str, items: list) -> bool:
    return text.isdigit() and int(text) < len(items)


def _explain(error: ValidationError, tree: dict) -> str:
    """The first mistake in one line."""
    mistake = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("function-"))
    where = re.sub(r"\.(float|int|bool|str|list\[float\])$|\.tuple\[str, \.\.\.\]", "", where)
    value = _shown(mistake.get("input"))
    more = (
        f" (and {error.error_count() - 1} more)"
        if error.error_count() > 1 and mistake["type"] != "dataclass_type"
        else ""
    )
    if mistake["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key{_suggest(mistake['loc'], tree)}{more}"
    if mistake["type"] in ("missing", "missing_argument"):
        return f"{where}: missing; this key must be given{more}"
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    return f"{where}: {value} will not do: {mistake['msg'][0].lower()}{mistake['msg'][1:]}{more}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _suggest(loc: tuple, tree: dict) -> str:
    """`; did you mean X?` or the keys that exist there."""
    kind: Any = Config
    for part in loc[:-1]:
        if isinstance(part, str) and is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        kind = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), kind)
    if not is_dataclass(kind):
        return ""
    known = [f.name for f in fields(kind)]
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
