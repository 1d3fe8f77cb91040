"""What a recipe says: which models, or which of their layers, are merged how, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion.merge.settings import check_setting, is_number

DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Lines:
    """LiNeS: the update of layer l of L is multiplied by alpha + beta · l / (L − 1); outside of layers by `outside`, or
    by alpha where that is None."""

    alpha: float
    beta: float
    outside: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("outside", self.outside)):
            if not is_number(value) and not (name == "outside" and value is None):
                raise ValueError(f"lines: {name}: {value!r} must be a finite number")


@dataclass(frozen=True)
class Source:
    """Layers of a model, from the first of `layers` up to but not including the second."""

    model: str
    layers: tuple[int, int]

    @property
    def height(self) -> int:
        """How many layers."""
        return self.layers[1] - self.layers[0]


@dataclass(frozen=True)
class Slice:
    """Layers of the result, merged from as many layers of each source.

    `parameters`: all of the method's, as in a recipe; a list has one for each source. `base`: what they changed since;
    None for the recipe's base, at the layers of the first source. `method`: None for the recipe's. ValueError for
    sources of different heights.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base: Source | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        for own in (*self.sources, *([] if self.base is None else [self.base])):
            if own.height != self.sources[0].height:
                first = self.sources[0]
                raise ValueError(
                    f"slices: {list(own.layers)} of {own.model} are {own.height} layers and {list(first.layers)} of "
                    f"{first.model} are {first.height}; all sources of a slice need as many"
                )


@dataclass(frozen=True)
class TokenRow:
    """Where the embedding of a token comes from: another token of a model by name or by id, its own there, or zeros.

    `model`: None for zeros. `token`, `token_id`: one of them, or neither for the token itself. `force`: also for
    models that have the token.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the result: `source` is `union`, `base` or a model; rows padded to a multiple."""

    source: str = "union"
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Output:
    """What is written: the `model`, or its `task_vector` since the base.

    A task vector is in full, as a LoRA adapter of `rank`, or `ternary`, with the `density` largest updates of all
    kept (ComPEFT, Yadav et al. 2023, arXiv 2311.13171).
    """

    kind: str = "model"
    form: str = "full"
    rank: int = 16
    density: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in ("model", "task_vector"):
            raise ValueError(f"output: kind: {self.kind!r} must be model or task_vector")
        if self.form not in ("full", "lora", "ternary"):
            raise ValueError(f"output: form: {self.form!r} must be full, lora or ternary")
        if self.form != "full" and self.kind == "model":
            raise ValueError(f"output: form: {self.form!r} is for a task vector; set kind: task_vector")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"output: rank: {self.rank!r} must be a whole number, 1 or more")
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(f"output: density: {self.density!r} must be a number in (0, 1]")


@dataclass(frozen=True)
class MergeRecipe:
    """What to merge and how; models are local checkpoint folders (`FOLDER` or `FOLDER+ADAPTER`) in the end.

    `parameters`: settings by name, see `fusion.merge.settings`. `dtype` is that of the tensors written: float32,
    bfloat16, float16, or None for that of each of the base's tensors (of the first model's where there is no base).
    `statistics`: a folder of each model's, from `fusion.merge.collect`. `slices`: layers of the result, bottom first;
    none for all layers of all models. `reference`: whose configuration and tokenizer are taken where it is neither the
    base nor the first model. `tokenizer`: None refuses vocabularies that differ. `chat_template`: None for the one that
    is there, `auto`, a name, or the template itself. Raises ValueError, one line, for what cannot be.
    """

    method: str
    base: str | None
    models: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    statistics: tuple[str, ...] = ()
    lines: Lines | None = None
    slices: tuple[Slice, ...] = ()
    reference: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    output: Output = Output()

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: there are none to merge; name at least one")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype: {self.dtype!r} must be one of {', '.join(DTYPE_NAMES)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed!r} must be a whole number, 0 or more")
        for parameters in (self.parameters, *(part.parameters for part in self.slices)):
            for name, setting in parameters.items():
                check_setting(name, setting)
        if self.statistics and len(self.statistics) != len(self.models):
            raise ValueError(
                f"statistics: {len(self.statistics)} folders for {len(self.models)} models; give one for each model"
            )
        asks = {"lines": self.lines is not None and not self.has_base}
        asks["output"] = self.output.kind == "task_vector" and self.base is None
        for key, lacking in asks.items():
            if lacking:
                raise ValueError(f"{key}: needs a base, the model that the others were trained from; name it as `base`")

    @property
    def has_base(self) -> bool:
        """Whether there is a base for all of it."""
        return self.base is not None or (bool(self.slices) and all(part.base is not None for part in self.slices))
