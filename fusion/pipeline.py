"""The stages in order: prepare → capture → align → distill → merge → release. The only file that knows them all."""

import importlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusion import cluster, config_file, hub, tracking
from fusion import repair as fixing
from fusion.artifact import MANIFEST, Artifact, digest, read_manifest, verify
from fusion.config import SAMPLERS, Config, Model

# stage → its module, and the number of its format: raised when the same settings no longer give the same bytes
STAGES = {
    "prepare": ("data_prep.stage", 3),
    "capture": ("fusion.capture.stage", 3),
    "align": ("fusion.align.stage", 2),
    "distill": ("fusion.distill.stage", 4),
    "merge": ("fusion.merge.stage", 6),
    "release": ("fusion.release.stage", 1),
}
# settings that change how long a stage takes or whether it starts, never what it writes
_IDLE = {
    "per_rank",
    "save_steps",
    "too_long",
    "on_nonfinite",
    "gradient_checkpointing",
    "batch_tokens",
    "data",
    "packing",
    "workers",
}
# settings that came later: where they say nothing, what was made before them is still what would be made
_LATER = {"freeze_embeddings": False}
_OF_TEACHERS = {
    *("gate", "gate_level", "gate_unit", "gate_temperature", "weights", "pivot", "topology", "k"),
    *("label_weight", "label_schedule", "label_weight_end"),
    *("divergence", "beta", "missing_mass", "teacher_temperature", "student_temperature"),
}


@dataclass(frozen=True)
class Task:
    """One run of one stage: where it writes and the folders it reads."""

    out: Artifact
    inputs: Mapping[str, Path]


@dataclass(frozen=True)
class Found:
    """What the config names, found on disk: each model's folder and digests, each dataset's digest."""

    folders: Mapping[str, Path]
    prints: Mapping[str, Mapping[str, str]]
    data: Sequence[str]


def run(
    config: Config,
    only: Sequence[str] = (),
    start: str | None = None,
    repair: bool = False,
    targets: Sequence[str] = (),
) -> None:
    """Do all stages that are not done, or only some, on every rank.

    Args:
        only: stages to do; what they read must be finished.
        start: the first stage to do; what comes before must be finished.
        repair: look through all that was finished before, and make what is missing or damaged again.
        targets: of the stage distill, those to train; others are left alone.

    Raises:
        ValueError: anything that the user can mend, in one line.
    """
    if repair:
        config = cluster.on_main(lambda: fixing.readable(config))
    found = cluster.on_main(lambda: find(config))
    tasks = cluster.on_main(lambda: plan(config, found))
    trained = [task.out.subject for task in tasks if task.out.stage == "distill"]
    for name in targets:
        if name not in trained:
            raise ValueError(f"--target {name}: there is no such target; known here: {', '.join(trained)}")
    wanted = [
        s
        for s in STAGES
        if (not only or s in only) and (start is None or list(STAGES).index(s) >= list(STAGES).index(start))
    ]
    if repair:
        cluster.on_main(lambda: fixing.mend([task.out for task in tasks if task.out.stage in wanted], stage))
    pending = cluster.on_main(lambda: {t.out.stage for t in tasks if not t.out.done()})
    for name in wanted:
        if name in pending and hasattr(stage(name), "check"):
            stage(name).check(config)  # better now than hours from now
    checked: set[Path] = set()
    if any(m.cache for m in candidates(config)) and wanted != ["prepare"]:
        if "prepare" in wanted and not cluster.on_main(tasks[0].out.done):
            _do(config, tasks[0], checked)
        config = cluster.on_main(lambda: _admitted(config, found, tasks[0].out, repair, checked))
        tasks = cluster.on_main(lambda: plan(config, find(config)))
    tried = False
    left = [t for t in tasks if targets and t.out.stage == "distill" and t.out.subject not in targets]
    for task in tasks:
        if task in left:
            continue
        if cluster.on_main(task.out.done):
            if hasattr(stage(task.out.stage), "accept"):
                cluster.on_main(partial(stage(task.out.stage).accept, config, task.out))
            tracking.say(f"[dim]{task.out.label:<20} done before[/dim]  {task.out.folder}")
        elif task.out.stage in wanted:
            if task.out.stage == "capture" and not tried and hasattr(stage("capture"), "try_templates"):
                tried = True  # better now than at the last source
                cluster.on_main(partial(stage("capture").try_templates, config, found.folders, tasks[0].out.folder))
            _do(config, task, checked)
            if hasattr(stage(task.out.stage), "accept"):
                cluster.on_main(partial(stage(task.out.stage).accept, config, task.out))
        elif any(t.out.stage in wanted and task.out.folder in t.inputs.values() for t in tasks if t not in left):
            raise ValueError(
                f"{task.out.label} is not finished and a stage that was asked for reads it; leave away --only or --from"
            )
    last = tasks[-1]
    if "release" in wanted:
        stage(last.out.stage).announce(config, last.out)


def stage(name: str) -> Any:
    """The module of a stage."""
    return importlib.import_module(STAGES[name][0])


def _do(config: Config, task: Task, checked: set[Path]) -> None:
    """Run one task on every rank and publish what it wrote."""
    tracking.say(f"[bold]{task.out.label}[/bold]")
    cluster.on_main(lambda: _check_inputs(task, checked))
    begun = time.monotonic()
    facts = stage(task.out.stage).run(config, task.inputs, task.out)
    seconds = time.monotonic() - begun
    cluster.barrier()

    def finish() -> None:
        task.out.publish(facts, seconds)
        shutil.rmtree(task.out.folder / "work", ignore_errors=True)

    cluster.on_main(finish)
    tracking.say(f"  {_brief(facts)}  [dim]{seconds:.1f} s[/dim]")


def _admitted(config: Config, found: Found, prepared: Artifact, repair: bool, checked: set[Path]) -> Config:
    """The config with the caches that are this run's; with `repair`, without those that are not."""
    if not prepared.done():
        raise ValueError("prepare is not finished and a stage that was asked for reads it; leave away --only or --from")

    def admit(m: Model) -> None:
        folder = found.folders[m.name]
        weights = digest(found.prints[m.name]) if any(folder.glob("*.safetensors")) else None
        stage("capture").admit(config, m, folder, weights, prepared.folder)
        assert m.cache is not None
        checked.add(Path(m.cache))

    return fixing.admitted(config, admit, repair)


def _check_inputs(task: Task, checked: set[Path]) -> None:
    task.out.folder.mkdir(parents=True, exist_ok=True)
    for folder in task.inputs.values():
        if folder not in checked and (folder / MANIFEST).exists():
            verify(folder)
            checked.add(folder)


def _brief(facts: Mapping[str, Any]) -> str:
    """The numbers among the facts, on one line."""
    shown = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:,.5g}"
        for name, value in facts.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return ", ".join(shown[:9])


def find(config: Config) -> Found:
    """Find and fingerprint every model and dataset.

    Raises:
        ValueError: one that is missing or broken, by its config key.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    memory = config.folder / ".fingerprints.json"
    folders, prints = {}, {}
    for key, model in [
        ("pivot.model", config.pivot),
        *((f"sources.{n}.model", s) for n, s in enumerate(config.sources)),
    ]:
        folders[model.name] = hub.locate(model, key, weights=model is config.pivot or model.cache is None)
        prints[model.name] = hub.fingerprint(folders[model.name], memory)
    return Found(folders, prints, [hub.fingerprint_data(d.data, memory) for d in config.prepare.data])


def plan(config: Config, found: Found) -> list[Task]:
    """Every task of a fusion, in an order in which each comes after what it reads."""
    root = config.folder
    tasks: list[Task] = []

    def task(
        name: str, subject: str, settings: Mapping[str, Any], reads: Mapping[str, Artifact | tuple[Path, str]]
    ) -> Artifact:
        keys = {n: r.key if isinstance(r, Artifact) else r[1] for n, r in reads.items()}
        out = Artifact.planned(root, name, subject, {"format": STAGES[name][1], **settings}, keys)
        tasks.append(Task(out, {n: r.folder if isinstance(r, Artifact) else r[0] for n, r in reads.items()}))
        return out

    def model(m: Model) -> tuple[Path, str]:
        return found.folders[m.name], digest(found.prints[m.name])

    def tokenizer(m: Model) -> tuple[Path, str]:
        return found.folders[m.name], found.prints[m.name]["tokenizer"]

    datasets = [_settings(d, "limit", "where", "domain", "heldout", "split", "subset") for d in config.prepare.data]
    prepare = task(
        "prepare", "", {**_settings(config.prepare), "data": [[*p] for p in zip(found.data, datasets, strict=True)]}, {}
    )
    teachers = candidates(config)
    caches: dict[str, Any] = {}
    maps: dict[str, Artifact] = {}
    for m in teachers:
        if m.cache is not None:
            caches[m.name] = (Path(m.cache), str(read_manifest(Path(m.cache))["key"]))
        else:
            how = {
                **_settings(config.capture, "sampler", *SAMPLERS[config.capture.sampler]),
                "dtype": m.dtype,
                "template": hub.template_of(m),
            }
            caches[m.name] = task("capture", m.name, how, {"prepare": prepare, "model": model(m)})
    for m in teachers:
        if m is config.pivot and config.distill.pivot != "teach":
            continue
        how = {**_settings(config.align), "templates": [hub.template_of(m), hub.template_of(config.pivot)]}
        reads = {"prepare": prepare, "cache": caches[m.name], "model": tokenizer(m), "pivot": tokenizer(config.pivot)}
        maps[m.name] = task("align", m.name, how, reads)
    targets: dict[str, Artifact] = {}
    for name, taught_by in _targets(config, teachers).items():
        idle = set() if taught_by else _OF_TEACHERS
        how = {
            k: v for k, v in _settings(config.distill).items() if k not in {"control", "topology", "deepspeed", *idle}
        }
        how |= {
            "seed": config.seed,
            "deepspeed": _optimizer(config.distill.deepspeed),
            "template": hub.template_of(config.pivot),
        }
        reads = {"prepare": prepare, "pivot": model(config.pivot)}
        reads |= {
            f"{kind}/{t}": made[t] for t in taught_by for kind, made in (("cache", caches), ("map", maps)) if t in made
        }
        targets[name] = task("distill", name, how, reads)
    fused = {f"target/{n}": t for n, t in targets.items() if n != "control"}
    reads = {"prepare": prepare, "pivot": model(config.pivot), **fused}
    merged = task("merge", "", {**_settings(config.merge), "template": hub.template_of(config.pivot)}, reads)
    here = [*(s for s in config.sources if s.cache is None), config.pivot]  # a cached source may lack its weights
    measured = {f"model/{m.name}": model(m) for m in here}
    between = {a.label: a for a in [*(c for c in caches.values() if isinstance(c, Artifact)), *maps.values()]}
    reads = {
        "prepare": prepare,
        "merge": merged,
        **measured,
        **{f"target/{n}": t for n, t in targets.items()},
        **between,
    }
    task("release", "", {**_settings(config.release), "name": config.name}, reads)
    return tasks


def candidates(config: Config) -> list[Model]:
    """The models whose caches are needed: the sources, and the pivot where the gate asks it."""
    asked = config.distill.pivot != "absent" and config.distill.gate != "none"
    return [*config.sources, *([config.pivot] if asked else [])]


def _targets(config: Config, teachers: Sequence[Model]) -> dict[str, list[str]]:
    """Target name → the names of its teachers."""
    own = [t.name for t in teachers if t is config.pivot]
    control: dict[str, list[str]] = {"control": []} if config.distill.control else {}
    if config.distill.topology == "joint":
        return {"joint": [t.name for t in teachers], **control}
    return {**{s.name: [s.name, *own] for s in config.sources}, **control}


def _settings(part: Any, *names: str) -> dict[str, Any]:
    """The settings of a config section that decide what its stage writes."""
    told = {k: v for k, v in asdict(part).items() if k not in _LATER or v != _LATER[k]}
    return {k: v for k, v in told.items() if (k in names if names else k not in _IDLE)}


def _optimizer(path: str) -> str:
    """Digest of a DeepSpeed file without its ZeRO section, which shards the same computation."""
    return digest({k: v for k, v in config_file.deepspeed(path).items() if k != "zero_optimization"})
