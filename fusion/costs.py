"""`--plan`: stages, sizes and costs before anything runs, also for models and data that are not here yet."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table

from fusion import hub, pipeline, tracking
from fusion.config import Config, Dataset, Model

BYTES_PER_TOKEN = 4.0  # English prose under vocabularies of 32,000 to 150,000 ids
DEVICE_FLOPS = 400e12  # a second: bfloat16 on an H100 at 40% of its peak
PASS_FLOPS = 2  # per parameter and token: one forward pass; training takes three times that
STATE_BYTES = 16  # per parameter: bfloat16 weights and gradients, float32 master weights and Adam's two moments
BUDGET_NOTE = f"times at {DEVICE_FLOPS / 1e12:.0f} TFLOP/s a device, {BYTES_PER_TOKEN:.0f} bytes a token"


@dataclass(frozen=True)
class Cost:
    """One row of the plan; None where it cannot be known before models and data are here."""

    label: str
    reads: str
    tokens: float | None = None
    flops: float | None = None
    disk: float | None = None
    state: str = "to do"


def estimate(config: Config) -> list[Cost]:
    """A row a task, from what is on disk, else from the config's `parameters` and `megabytes`."""
    size = _sum(_train_bytes(config, d) for d in config.prepare.data if not d.heldout)
    tokens = None if size is None else size / BYTES_PER_TOKEN
    states = _states(config)
    pivot = _parameters(config.pivot)
    distill = config.distill
    teachers = pipeline.candidates(config)
    rows = [Cost("prepare", f"{len(config.prepare.data)} datasets", tokens, 0, None if size is None else size / 3)]
    for m in teachers:
        if m.cache is None:
            # an entry is 4 bytes of id and 2 of log-probability, a token some 13 more; zstd takes about a third off
            disk = _times(tokens, (6 * config.capture.k + 13) * 0.65)
            rows.append(Cost(f"capture/{m.name}", m.model, tokens, _times(PASS_FLOPS, _parameters(m), tokens), disk))
    taught_by = [m for m in teachers if m is not config.pivot or distill.pivot == "teach"]
    rows += [Cost(f"align/{m.name}", f"{m.model} → {config.pivot.model}", tokens, 0, 2e6) for m in taught_by]
    names = ["joint"] if distill.topology == "joint" else [s.name for s in config.sources]
    seen = _times(tokens, distill.epochs)
    weights = _times(2, pivot)
    for name in [*names, *(["control"] if distill.control else [])]:
        rows.append(Cost(f"distill/{name}", config.pivot.model, seen, _times(3 * PASS_FLOPS, pivot, seen), weights))
    rows.append(Cost("merge", f"{len(names)} targets, {config.merge.method}", None, 0, weights))
    rows.append(Cost("release", "everything, measured on the held-out samples", None, None, weights))
    return [Cost(r.label, r.reads, r.tokens, r.flops, r.disk, states.get(r.label, "to do")) for r in rows]


def show(config: Config) -> None:
    """Print the plan."""
    rows = estimate(config)
    table = Table(title=f"plan of {config.name}", title_justify="left")
    for column in ("stage", "reads"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "device hours", "disk", "state"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        hours = None if r.flops is None else r.flops / DEVICE_FLOPS / 3600
        table.add_row(r.label, r.reads, _count(r.tokens), _hours(hours), _bytes(r.disk), r.state)
    tracking.show(table)
    total = _sum(r.flops for r in rows if r.label != "release")
    tracking.say(f"in all: {_hours(None if total is None else total / DEVICE_FLOPS / 3600)} device hours, "
                 f"{_bytes(_sum(r.disk for r in rows))} on disk under {config.folder}; {BUDGET_NOTE}")  # fmt: skip
    pivot = _parameters(config.pivot)
    stage = pipeline.deepspeed_settings(config.distill.deepspeed).get("zero_optimization", {}).get("stage", 0)
    if pivot is not None:
        tracking.say(
            f"training state of one target: {_bytes(STATE_BYTES * pivot)} in all; under ZeRO-{stage} on 8 devices "
            f"{_bytes(_state_a_device(pivot, stage, 8))} each, and activations"
        )
    unknown = [m.name for m in (config.pivot, *config.sources) if _parameters(m) is None]
    if unknown:
        tracking.say(f"sizes not known: {', '.join(unknown)}; download them or set `parameters` for the plan")


def _state_a_device(parameters: float, stage: int, devices: int) -> float:
    """Bytes of weights (2), gradients (2) and optimizer state (12) a parameter, those that the stage shards divided."""
    shards = {"optimizer": stage >= 1, "gradients": stage >= 2, "weights": stage >= 3}
    sizes = {"optimizer": 12, "gradients": 2, "weights": 2}
    return parameters * sum(size / (devices if shards[part] else 1) for part, size in sizes.items())


def _states(config: Config) -> dict[str, str]:
    """done, cut off or to do, for every task whose inputs are here."""
    local = all(Path(m.model).is_dir() for m in (config.pivot, *config.sources))
    if not local or not all(Path(d.data).exists() for d in config.prepare.data):
        return {}
    found = {}
    for task in pipeline.plan(config, pipeline.find(config)):
        begun = task.out.folder.exists()
        found[task.out.label] = "done" if task.out.done() else "cut off, goes on" if begun else "to do"
    return found


def _parameters(model: Model) -> float | None:
    folder = Path(model.model)
    if model.parameters is not None or not folder.is_dir():
        return model.parameters
    return float(hub.count_parameters(folder)) or None


def _train_bytes(config: Config, dataset: Dataset) -> float | None:
    path = Path(dataset.data)
    if dataset.megabytes is not None:
        size = dataset.megabytes * 1e6
    elif path.is_file():
        size = float(path.stat().st_size)
    else:
        return None
    heldout = 0 if any(d.heldout for d in config.prepare.data) else config.prepare.heldout_share
    return size * config.prepare.train_share * (1 - heldout)


def _times(*factors: float | None) -> float | None:
    known = [f for f in factors if f is not None]
    return prod(known) if len(known) == len(factors) else None


def _sum(parts: Iterable[float | None]) -> float | None:
    values = list(parts)
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _count(value: float | None) -> str:
    if value is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float | None) -> str:
    return "?" if value is None else f"{_count(value)}B"


def _hours(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.1f}" if value >= 0.05 else "0" if value == 0 else "< 0.1"
