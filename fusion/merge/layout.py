"""From a recipe and opened models to a list of jobs: what each tensor of the result is made of, all of it checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion.merge import chat
from fusion.merge.correspond import Model, check_alike, check_names, leave_out_buffers, vocabulary_rows
from fusion.merge.folders import files_of, folders_of, tokenizer_digest
from fusion.merge.jobs import Checkpoint, Job, Layout, View
from fusion.merge.layers import before_layers, sliced_config
from fusion.merge.methods import Method, get_method
from fusion.merge.methods.lines import scale
from fusion.merge.records import MergeRecipe, Slice, Source
from fusion.merge.settings import at_tensor
from fusion.merge.statistics import Statistics


@dataclass(frozen=True)
class _Group:
    """Models that are merged together: all of the recipe's, or those of a slice.

    `base`, `sources`: models; `bottoms`: the layer of each, a base first, that the group's first layer is made of;
    `order`: the sources' numbers among the recipe's models.
    """

    method: Method
    parameters: Mapping[str, Any]
    base: Model | None
    sources: tuple[Model, ...]
    order: tuple[int, ...]
    bottoms: tuple[int, ...] = ()
    height: int = 0

    @property
    def inputs(self) -> tuple[Model, ...]:
        """The sources, a base first."""
        return (*([] if self.base is None else [self.base]), *self.sources)


@dataclass(frozen=True)
class _Row:
    """A tensor of the result: its name there and in each input of its group, and where it lies.

    `height`: in its group, 0 at the first layer and outside of layers, 1 at the last.
    """

    name: str
    group: _Group
    names: tuple[str, ...]
    layer: int | None
    layers: int
    height: float


def lay_out(recipe: MergeRecipe, open_model: Callable[[str], Checkpoint] | None = None) -> Layout:
    """Open the models and plan every tensor of the result; reads headers, and the few tensors that must be equal.

    `open_model` gives the Checkpoint of one of the recipe's models. Raises ValueError, one line, for an unknown method
    or parameter, a base or statistics that are missing, vocabularies that differ, and models whose tensors do not
    correspond.
    """
    if open_model is None:
        from fusion.merge import opening

        open_model = opening.open_model
    for name in {recipe.method, *(part.method or recipe.method for part in recipe.slices)}:
        _check_method(recipe, get_method(name))
    with ExitStack() as stack:
        models: dict[str, Model] = {}
        for spec in _specs(recipe):
            models[spec] = Model(spec, open_model(spec))
            stack.callback(models[spec].checkpoint.close)  # views keep the files that they need
        return _Plan(recipe, models).layout()


def _check_method(recipe: MergeRecipe, method: Method) -> None:
    if method.needs_base and not recipe.has_base:
        raise ValueError(f"{method.name} needs a base, the model that the others were trained from; name it as `base`")
    if method.statistics is not None and not recipe.statistics:
        raise ValueError(
            f"{method.name} needs statistics of each model; collect them and name their folders as `statistics`"
        )
    if method.statistics is None and recipe.statistics and method.name == recipe.method:
        raise ValueError(f"statistics: {method.name} takes none; leave them out")


def _specs(recipe: MergeRecipe) -> list[str]:
    """Every model the recipe names, the one whose configuration and files are taken first."""
    named = [recipe.base or recipe.reference or recipe.models[0], *recipe.models]
    named += [part.base.model for part in recipe.slices if part.base is not None]
    if recipe.tokenizer is not None:
        named += [row.model for row in recipe.tokenizer.tokens.values() if row.model is not None]
        named += [recipe.tokenizer.source] if recipe.tokenizer.source not in ("union", "base") else []
    return list(dict.fromkeys(named))


class _Plan:
    """A recipe with its models opened."""

    def __init__(self, recipe: MergeRecipe, models: Mapping[str, Model]) -> None:
        self._recipe, self._models = recipe, models
        self._first = next(iter(models.values()))
        leave_out_buffers(list(models.values()))
        self._first.leave_out_copies()
        self._number = {model.spec: number for number, model in enumerate(models.values())}
        kind = get_method(recipe.method).statistics
        self._statistics = [Statistics(folder, str(kind)) for folder in recipe.statistics]
        self._checked: dict[str, Any] = {}
        self._joined = self._join()
        if self._joined is not None and self._statistics:
            raise ValueError("statistics: they have no rows for a joined vocabulary; merge models of one tokenizer")

    def layout(self) -> Layout:
        """All of it."""
        recipe = self._recipe
        groups = [self._slice(part) for part in recipe.slices] or [self._whole()]
        rows = self._sliced(groups) if recipe.slices else self._rows(groups[0])
        jobs = tuple(sorted((self._job(row) for row in rows), key=lambda job: job.name))
        self._check_output(jobs)
        config = self._sliced_config(groups) if recipe.slices else dict(self._first.config)
        template = None
        if recipe.chat_template is not None:
            template = chat.chosen(recipe.chat_template, [model.folder for model in self._models.values()])
        joined = self._joined
        if joined is not None:
            config = joined.config(config)

        def files(out: Path) -> None:
            if joined is not None:
                joined.files(out)
            if template is not None:
                chat.write(out, template)

        digest = self._digest(jobs, template)
        return Layout(jobs, recipe.models, config, self._first.folder, digest, recipe.seed, files)

    def _check_output(self, jobs: Sequence[Job]) -> None:
        """ValueError for a task vector of a model that has other tensors than the base."""
        if self._recipe.output.kind != "task_vector":
            return
        made = {job.name: job.shape for job in jobs}
        base = {name: self._first.view(name).shape for name in self._first.names}
        if apart := sorted(name for name in made.keys() | base.keys() if made.get(name) != base.get(name)):
            raise ValueError(
                f"output: a task vector needs a result with the base's tensors, and {apart[0]} is "
                f"{made.get(apart[0], 'not there')} in it, {base.get(apart[0], 'not there')} in {self._first.folder}"
            )

    def _whole(self) -> _Group:
        recipe = self._recipe
        base = None if recipe.base is None else self._models[recipe.base]
        sources = tuple(self._models[spec] for spec in recipe.models)
        return _Group(get_method(recipe.method), recipe.parameters, base, sources, tuple(range(len(sources))))

    def _slice(self, part: Slice) -> _Group:
        recipe = self._recipe
        origin = part.base
        if origin is None and recipe.base is not None:
            origin = Source(recipe.base, part.sources[0].layers)
        for own in (*part.sources, *([] if origin is None else [origin])):
            _, layers = self._models[own.model].layers.only(own.model)
            if own.layers[1] > layers:
                raise ValueError(
                    f"slices: {list(own.layers)}: {own.model} has {layers} layers; end at {layers} at most"
                )
        return _Group(
            get_method(part.method or recipe.method),
            part.parameters,
            None if origin is None else self._models[origin.model],
            tuple(self._models[own.model] for own in part.sources),
            tuple(recipe.models.index(own.model) for own in part.sources),
            tuple(own.layers[0] for own in (*([] if origin is None else [origin]), *part.sources)),
            part.sources[0].height,
        )

    def _rows(self, group: _Group) -> Iterator[_Row]:
        """Every tensor, of one name in all models."""
        same = {name: name for name in self._first.names}
        for model in group.inputs:
            check_names(self._first, same, model, model.names)
        layers = self._first.layers
        most = max(layers.stacks.values(), default=0)
        for name in sorted(same):
            place, names = layers.place(name), (name,) * len(group.inputs)
            if place is None:
                yield _Row(name, group, names, None, most, 0.0)
            else:
                yield _Row(name, group, names, place.layer, place.layers, place.height)

    def _sliced(self, groups: Sequence[_Group]) -> Iterator[_Row]:
        """The slices' layers, one above the other, and the other tensors, of the lowest slice or of the highest."""
        prefix, _ = self._first.layers.only(self._first.spec)
        total, bottom = sum(group.height for group in groups), 0
        for group in groups:
            for at in range(group.height):
                height = at / (group.height - 1) if group.height > 1 else 1.0
                for rest, names in _layer(group, at).items():
                    yield _Row(f"{prefix}{bottom + at}{rest}", group, names, bottom + at, total, height)
            bottom += group.height
        outside = {name: name for name in self._first.outside}
        for model in {id(model): model for group in (groups[0], groups[-1]) for model in group.inputs}.values():
            check_names(self._first, outside, model, model.outside)
        for name in outside:
            group = groups[0 if before_layers(name) else -1]
            yield _Row(name, group, (name,) * len(group.inputs), None, total, 0.0)

    def _sliced_config(self, groups: Sequence[_Group]) -> dict[str, Any]:
        # A base and the sources are of one architecture; the first source stands for all.
        picked = [
            (group.sources[0].config, group.bottoms[-len(group.sources)] + at)
            for group in groups
            for at in range(group.height)
        ]
        return sliced_config(self._first.config, self._first.layers.only(self._first.spec)[1], picked)

    def _job(self, row: _Row) -> Job:
        group, recipe = row.group, self._recipe
        views = [self._view(model, name) for model, name in zip(group.inputs, row.names, strict=True)]
        first = views[0]
        if not check_alike(views):
            return Job(row.name, first.shape, first.dtype, (first,), layer=row.layer, layers=row.layers)
        given = at_tensor(group.parameters, row.name, row.names[-len(group.sources) :], row.height)
        return Job(
            row.name,
            first.shape,
            recipe.dtype or _beneath(first),
            tuple(views[-len(group.sources) :]),
            base=None if group.base is None else first,
            statistics=self._statistics_of(row, views),
            method=group.method.name,
            parameters=self._parameters(group.method, given, len(group.sources)),
            order=group.order,
            layer=row.layer,
            layers=row.layers,
            scale=self._scale(row),
        )

    def _scale(self, row: _Row) -> float:
        lines = self._recipe.lines
        return 1.0 if lines is None else scale(lines.alpha, lines.beta, row.layer, row.layers, lines.outside)

    def _parameters(self, method: Method, given: Mapping[str, Any], models: int) -> Any:
        """As the method checks them, the same ones once."""
        key = f"{method.name} {models} {given!r}"
        if key not in self._checked:
            self._checked[key] = method.check(given, models)
        return self._checked[key]

    def _view(self, model: Model, name: str) -> View:
        view = model.view(name)
        if self._joined is None:
            return view
        if self._joined.is_vocabulary(name, view.shape, model.config):
            return self._joined.view(self._number[model.spec], name, view)
        if model.layers.place(name) is None:
            self._joined.refuse_unknown(self._number[model.spec], name, view.shape)
        return view

    def _statistics_of(self, row: _Row, views: Sequence[View]) -> tuple[View, ...]:
        """Of each model; none where no model has any."""
        if row.group.method.statistics is None:
            return ()
        names = row.names[-len(row.group.sources) :]
        found = [self._statistics[number].view(name) for number, name in zip(row.group.order, names, strict=True)]
        there = [view for view in found if view is not None]
        if there and len(there) < len(found):
            lacking = self._statistics[row.group.order[found.index(None)]].folder
            raise ValueError(f"statistics: {lacking} has none of {row.name}, others have; collect all alike")
        if there and row.group.method.statistics == "element":
            check_alike([views[0], *there])
        return tuple(there)

    def _join(self) -> Any:
        """The vocabularies by token; None where all models have the same."""
        from fusion.merge.vocabulary import join_vocabularies

        settings, models = self._recipe.tokenizer, list(self._models.values())
        if settings is None:  # files of the same bytes need no reading
            alike: dict[Any, Model] = {}
            for model in models:
                alike.setdefault((vocabulary_rows(model.config), tokenizer_digest(model.folder)), model)
            models = list(alike.values())
            if len(models) == 1:
                return None
        base = 0 if self._recipe.base or self._recipe.reference else None
        return join_vocabularies(settings, [model.checkpoint for model in models], base, [one.spec for one in models])

    def _digest(self, jobs: Sequence[Job], template: str | None) -> str:
        """Of all that decides the result: the recipe, what came of it, and the files it reads, by size and time."""
        told = [
            asdict(self._recipe),
            template,
            self._joined and self._joined.digest,
            [(job.name, job.shape, job.dtype, repr(job.parameters), job.scale) for job in jobs],
            [files_of(part) for model in self._models.values() for part in (model.folder, *folders_of(model.spec))],
            [files_of(statistics.folder) for statistics in self._statistics],
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _beneath(view: View) -> str:
    """The type of a tensor as it is stored, without what is put on it (an adapter computes in float32)."""
    return _beneath(view.base) if hasattr(view, "base") else view.dtype


def _layer(group: _Group, at: int) -> dict[str, tuple[str, ...]]:
    """The tensors of one of a group's layers: what follows the number in their names, and their names in each input."""
    layers = [model.by_layer[bottom + at] for model, bottom in zip(group.inputs, group.bottoms, strict=True)]
    for model, bottom, own in zip(group.inputs, group.bottoms, layers, strict=True):
        begin = f"{model.layers.only(model.spec)[0]}{bottom + at}"
        check_names(group.inputs[0], {name: begin + rest for rest, name in layers[0].items()}, model, own.values())
    return {rest: tuple(own[rest] for own in layers) for rest in layers[0]}
