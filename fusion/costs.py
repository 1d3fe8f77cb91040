"""`--plan`: stages, sizes and costs before anything runs, also for models and data that are not here yet.

What each figure is made of stands in docs/scale.md; the arithmetic is `fusion.sizes`, what is here `fusion.survey`.
"""

from dataclasses import dataclass, replace

from rich.table import Table

from fusion import cluster, config_file, pipeline, sizes, tracking
from fusion.config import Config, Model
from fusion.survey import Survey, dtype_of, parameters, states, survey

_DAYS = (1, 3, 7)
_MAP_BYTES = 2e6
MEASURED, ESTIMATED, CAPTURED = "measured", "estimated", "captured"


@dataclass(frozen=True)
class Cost:
    """One row of the plan; None where it cannot be known before models and data are here.

    Attributes:
        hours: of one device: the one that is here where `by` says measured, else the one that is assumed.
        disk: bytes.
        by: measured (on this device, or counted), captured (it is there) or estimated.
    """

    label: str
    reads: str
    samples: float | None = None
    tokens: float | None = None
    hours: float | None = None
    disk: float | None = None
    by: str = ESTIMATED
    state: str = "to do"


def estimate(config: Config, found: Survey | None = None) -> list[Cost]:
    """A row a task, from what is here, else from the config's `parameters` and `megabytes`.

    Args:
        found: what is here; without it, what can be known without reading data or loading models.
    """
    found = found or survey(config, calibrate=False)
    material, distill = found.material, config.distill
    size = material.size
    tokens = None if size is None else size / sizes.BYTES_PER_TOKEN
    teachers = pipeline.candidates(config)
    how = MEASURED if material.measured else ESTIMATED
    disk = None if size is None else size / 3
    rows = [Cost("prepare", f"{len(config.prepare.data)} datasets", material.samples, tokens, 0, disk, how)]
    captures = {m.name: _capture(config, m, found) for m in teachers if m.cache is None}
    rows += captures.values()
    for m in teachers:
        if m is not config.pivot or distill.pivot == "teach":
            of = captures[m.name].tokens if m.name in captures else tokens
            rows.append(Cost(f"align/{m.name}", f"{m.model} → {config.pivot.model}", None, of, 0, _MAP_BYTES))
    names = ["joint"] if distill.topology == "joint" else [s.name for s in config.sources]
    pivot = parameters(config.pivot)
    own = captures[config.pivot.name].tokens if config.pivot.name in captures else tokens
    seen, weights = sizes.product(own, distill.epochs), sizes.product(2, pivot)
    active = config.pivot.active_parameters or pivot
    hours = None if seen is None or active is None else 3 * sizes.reading_hours(active, seen)
    tried = found.trials.get(config.pivot.name)
    if tried is not None and seen is not None:
        hours = 3 * seen / tried.rate / 3600  # a step is three passes of what was timed as one
    for name in [*names, *(["control"] if distill.control else [])]:
        rows.append(Cost(f"distill/{name}", config.pivot.model, None, seen, hours, weights))
    measures = config.merge.scale == "auto" or config.merge.weighs(len(names))
    held = sizes.product(2, weights) if measures else weights  # the best so far and the next
    rows.append(Cost("merge", f"{len(names)} targets, {config.merge.method}", None, None, 0, held))
    rows.append(Cost("release", "everything, measured on the held-out samples", disk=weights))
    begun = states(found.tasks.values())
    return [replace(r, state=begun.get(r.label, "to do")) for r in rows]


def _capture(config: Config, model: Model, found: Survey) -> Cost:
    """One source's row: as it was captured, as its trial says, or by formula."""
    material = found.material
    row = Cost(f"capture/{model.name}", model.model, material.samples)
    facts, tried = found.captured.get(model.name), found.trials.get(model.name)
    if facts is not None:
        return replace(
            row, samples=facts["samples"], tokens=facts["tokens"], hours=0, disk=facts["bytes on disk"], by=CAPTURED
        )
    if tried is not None:
        assert material.size is not None
        share = 1 - tried.left_out
        tokens = share * material.size * tried.tokens / tried.text
        samples = sizes.product(material.samples, share)
        hours, disk = tokens / tried.rate / 3600, tokens * tried.disk / tried.tokens
        return replace(row, samples=samples, tokens=tokens, hours=hours, disk=disk, by=MEASURED)
    if material.size is None:
        return row
    tokens = material.size / sizes.BYTES_PER_TOKEN
    active = model.active_parameters or parameters(model)
    timed = None if active is None else sizes.reading_hours(active, tokens)
    return replace(row, tokens=tokens, hours=timed, disk=tokens * sizes.cache_bytes(config.capture))


def show(config: Config, calibrate: bool = True) -> None:
    """Print the plan, from rank 0.

    Args:
        calibrate: let each source that is here read for some seconds first.
    """
    if not cluster.is_main():
        return
    found = survey(config, calibrate)
    rows = estimate(config, found)
    table = _table(f"plan of {config.name}", "stage reads", "tokens", "device hours", "disk", "by", "state")
    for r in rows:
        table.add_row(
            r.label, r.reads, sizes.count(r.tokens), sizes.in_hours(r.hours), sizes.in_bytes(r.disk), r.by, r.state
        )
    tracking.show(table)
    ahead = [r for r in rows if r.state != "done" and r.label != "release"]
    tracking.say(
        f"in all: {sizes.in_hours(sizes.total(r.hours for r in ahead))} device hours ahead, "
        f"{sizes.in_bytes(sizes.total(r.disk for r in rows))} on disk under {config.folder}"
    )
    tracking.say(
        f"measured: on this device ({found.devices} here); estimated: at {sizes.DEVICE_FLOPS / 1e12:.0f} TFLOP/s a "
        f"device, {sizes.BYTES_PER_TOKEN:.0f} bytes a token (docs/scale.md)"
    )
    for why in dict.fromkeys(found.reasons.values()):
        tracking.say(f"not calibrated ({why}): {', '.join(n for n, w in found.reasons.items() if w == why)}")
    captures = [r for r in rows if r.label.startswith("capture/")]
    _show_sources(config, captures, found)
    _show_nodes(config, captures, found.memory)
    _show_training(config)
    unknown = [m.name for m in (config.pivot, *config.sources) if parameters(m) is None]
    if unknown:
        tracking.say(f"sizes not known: {', '.join(unknown)}; download them or set `parameters` for the plan")


def _table(title: str, left: str, *right: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left.split():
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _show_sources(config: Config, captures: list[Cost], found: Survey) -> None:
    """What each capture takes, and where a source fits."""
    here = f"hours on {found.devices}"
    fits = f"{sizes.in_bytes(found.memory)} devices"
    table = _table("captures", "source", "samples", "tokens", "tokens/s", "bytes/token", "cache", here, "weights", fits)
    told = all(
        d.megabytes for d in config.prepare.data if not d.heldout
    )  # a file's size knows no `limit` and no `where`
    least = found.material.size / config.prepare.max_bytes if told and found.material.size else None
    hints = []
    for r, m in _captured(config, captures):
        rate = r.tokens / r.hours / 3600 if r.tokens and r.hours else None
        each = r.disk / r.tokens if r.disk and r.tokens else None
        samples = f"≥ {sizes.count(least)}" if r.samples is None and least else sizes.count(r.samples)
        weights = _weights(m)
        devices = None if weights is None else sizes.devices_for(weights, found.memory)
        needs = "?" if devices is None else f"{'≥ ' if devices > 1 else ''}{devices}"
        figures = [sizes.count(r.tokens), sizes.count(rate), "?" if each is None else f"{each:.1f}"]
        hours = sizes.in_hours(sizes.product(r.hours, 1 / found.devices))
        table.add_row(m.name, samples, *figures, sizes.in_bytes(r.disk), hours, sizes.in_bytes(weights), needs)
        if devices is not None and devices > 1 and m.parallel == "none":
            hints.append(
                f"{m.name}: {sizes.in_bytes(weights)} of weights do not fit a device of "
                f"{sizes.in_bytes(found.memory)}; set `parallel: zero3` and take {devices} devices or more"
            )
    if captures:
        tracking.show(table)
    for hint in hints:
        tracking.say(hint)


def _show_nodes(config: Config, captures: list[Cost], memory: float) -> None:
    """How many nodes it takes to be done in some days, where one node takes more than a day."""
    hours = sizes.total(r.hours for r in captures)
    if hours is None or hours <= 24 * _DAYS[0] * sizes.NODE:
        return
    pairs = _captured(config, captures)
    spread = max((w for _, m in pairs if m.parallel == "zero3" and (w := _weights(m))), default=0.0)
    whole = max((w for _, m in pairs if m.parallel == "none" and (w := _weights(m))), default=0.0)
    table = _table(
        f"all captures, one after the other: {hours:,.0f} device hours, "
        f"{sizes.in_bytes(sizes.total(r.disk for r in captures))}",
        "",
        "done within",
        f"nodes of {sizes.NODE}",
        "devices",
        "spread weights a device",
        "whole weights a device",
    )
    for days in _DAYS:
        nodes = sizes.nodes_for(hours, days, spread, memory)
        devices = nodes * sizes.NODE
        held = [sizes.in_bytes(spread / devices), sizes.in_bytes(whole)]
        table.add_row(f"{days} day{'s' * (days > 1)}", str(nodes), str(devices), *held)
    tracking.show(table)


def _show_training(config: Config) -> None:
    pivot = parameters(config.pivot)
    if pivot is None:
        return
    zero, lora = config_file.deepspeed(config.distill.deepspeed).get("zero_optimization", {}), config.distill.lora
    stage, parts = zero.get("stage", 0), sizes.state_parts(zero, lora is not None)
    whole = pivot * sum(sizes.STATE_BYTES[part] for part in parts)
    saved = sizes.checkpoints_bytes(pivot, stage, config.distill)
    tracking.say(
        f"training state of one target ({', '.join(parts) or 'all offloaded'}): {sizes.in_bytes(whole)} in all; under "
        f"ZeRO-{stage} on {sizes.NODE} devices "
        f"{sizes.in_bytes(sizes.state_a_device(pivot, stage, sizes.NODE, parts))} each, and activations; "
        f"up to {sizes.in_bytes(saved)} more on disk for its checkpoints"
    )


def _captured(config: Config, captures: list[Cost]) -> list[tuple[Cost, Model]]:
    models = {f"capture/{m.name}": m for m in pipeline.candidates(config)}
    return [(r, models[r.label]) for r in captures]


def _weights(model: Model) -> float | None:
    """Bytes of a source's weights while it is captured."""
    return sizes.product(parameters(model), sizes.DTYPE_BYTES[dtype_of(model)])
