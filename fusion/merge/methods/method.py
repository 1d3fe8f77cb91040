"""A method as the registry knows it: the module that defines it, its needs, its parameters checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from fusion.merge.methods.base import Inputs, Merged, Range


@dataclass(frozen=True)
class Method:
    """One way to merge one tensor, defined by a module of this package.

    Each module has: `Parameters`, a frozen dataclass of typed fields with defaults, whose `__post_init__` refuses
    (ValueError) what does not go together; `merge(inputs, parameters) → Merged`; `NEEDS_BASE`; `REFERENCE`. It may
    have `MODELS`, how many it merges, where that is a fixed number; `STATISTICS`, the kind it needs of each model
    (`element`: a number for each element, in every block; `gram`: a matrix for each weight matrix); `ONE_PASS`, or
    `one_pass(parameters)`, if it reads a tensor once; `COMPILED`, if on the CPU it works on `Block.array` alone;
    `scratch_bytes(models, itemsize)`, what it holds for each element of a tensor beside blocks, and
    `in_full(job, parameters)`, for which tensors it does, where that is not all of them;
    `survey(inputs, parameters, state)` with `conclude(parameters, state, found)`, see `fusion.merge.engine`;
    `surveys(parameters)`, whether these parameters need one, and `SURVEYED`, the names of those that it goes by.
    """

    name: str
    module: ModuleType = field(repr=False)

    @property
    def needs_base(self) -> bool:
        """Whether it works on what changed since a base."""
        return self.module.NEEDS_BASE

    @property
    def statistics(self) -> str | None:
        """The kind of statistics it needs of each model, None where it needs none."""
        return getattr(self.module, "STATISTICS", None)

    def one_pass(self, parameters: Any) -> bool:
        """Whether it reads each tensor once, so that nothing of it need be kept."""
        if hasattr(self.module, "one_pass"):
            return self.module.one_pass(parameters)
        return getattr(self.module, "ONE_PASS", False)

    @property
    def compiled(self) -> bool:
        """Whether compiled loops do all of it on the CPU, without torch."""
        return getattr(self.module, "COMPILED", False)

    def scratch_bytes(self, job: Any, itemsize: int) -> int:
        """Bytes it holds of a `Job`'s tensor beside blocks, elements taking `itemsize` bytes; 0 where it streams."""
        module = self.module
        if not hasattr(module, "scratch_bytes"):
            return 0
        if hasattr(module, "in_full") and not module.in_full(job, job.parameters):
            return 0
        return math.prod(job.shape) * module.scratch_bytes(len(job.models), itemsize)

    def surveys(self, parameters: Any) -> bool:
        """Whether it looks at all tensors before it merges one."""
        return hasattr(self.module, "survey") and self.module.surveys(parameters)

    def merge(self, inputs: Inputs, parameters: Any = None) -> Merged:
        """Merge one tensor; `parameters` as `check` gives them, the defaults for None."""
        return self.module.merge(inputs, self.check({}, inputs.models) if parameters is None else parameters)

    def fields(self) -> dict[str, Any]:
        """The type of each parameter by name; per-model ones are `tuple[float, ...]`, maybe Annotated with a Range."""
        return typing.get_type_hints(self.module.Parameters, include_extras=True)

    def check(self, given: Mapping[str, Any], models: int) -> Any:
        """The method's `Parameters` for a number of models; what is absent takes its default.

        A parameter that each model has takes a number for all or a list, one for each. Raises ValueError naming the
        method, the parameter, its value and what would do.
        """
        exactly = getattr(self.module, "MODELS", models)
        if models != exactly:
            raise ValueError(f"{self.name} merges exactly {exactly} model{'s' * (exactly != 1)}, got {models}")
        types = self.fields()
        checked = {}
        for name, value in given.items():
            if name not in types:
                raise ValueError(
                    f"{self.name}: unknown parameter {name} = {value!r}; it takes {', '.join(types) or 'none'}"
                )
            checked[name] = _checked(f"{self.name}: {name} = {value!r}", value, types[name], models)
        for default in dataclasses.fields(self.module.Parameters):
            if default.name not in checked and isinstance(default.default, tuple) and len(default.default) == 1:
                checked[default.name] = default.default * models  # one number for all
        try:
            return self.module.Parameters(**checked)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def _checked(what: str, value: Any, annotation: Any, models: int) -> Any:
    """A parameter's value in its type; ValueError begins with `what`."""
    if typing.get_origin(annotation) is typing.Annotated:
        kind, allowed = typing.get_args(annotation)
    else:
        kind, allowed = annotation, Range()
    if isinstance(None, kind) if isinstance(kind, type) else type(None) in typing.get_args(kind):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{what} must be true or false")
        return value
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            raise ValueError(f"{what} must be a whole number: {allowed}")
        return value
    if kind is float:
        if not _is_number(value) or value not in allowed:
            raise ValueError(f"{what} must be {allowed}")
        return float(value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{what} must be one of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{what} must be text")
        return value
    assert kind == tuple[float, ...], f"{what}: no check for {kind}"
    if _is_number(value):
        value = [value] * models
    if not isinstance(value, list | tuple) or not all(_is_number(v) and v in allowed for v in value):
        raise ValueError(f"{what} must be {allowed} for all models, or a list with one for each")
    if len(value) != models:
        raise ValueError(f"{what} has {len(value)} numbers for {models} models; give one for each")
    return tuple(float(v) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
