"""What was made before, looked through: damaged files are made again, caches that will not do are captured here."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion import tracking
from fusion.artifact import MANIFEST, Artifact, damage, read_manifest
from fusion.config import Config, Model


def mend(finished: Sequence[Artifact], stage: Callable[[str], Any]) -> None:
    """Make finished folders with damaged files unfinished ones that lack them.

    Args:
        stage: name → its module, whose `repair`, where it has one, takes the damaged files out of what was kept.
    """
    for out in finished:
        if not (out.folder / MANIFEST).exists():
            continue
        try:
            manifest = read_manifest(out.folder)
        except ValueError as error:
            tracking.say(f"{error}: its files are looked at one by one")
            (out.folder / MANIFEST).unlink()
            continue
        broken = damage(out.folder, manifest["files"])
        for name, how in broken.items():
            tracking.say(f"{out.label}: {name} {how}: it is made again")
            (out.folder / name).unlink(missing_ok=True)
        if broken and hasattr(stage(out.stage), "repair"):
            stage(out.stage).repair(out.folder, manifest["files"], set(broken))
        if broken:
            (out.folder / MANIFEST).unlink()


def admitted(config: Config, admit: Callable[[Model], None], repair: bool) -> Config:
    """The config, without those of its caches that will not do where they are to be captured again.

    Args:
        admit: raises ValueError where a model's undamaged cache is not one of this run's.
        repair: do without what will not do.

    Raises:
        ValueError: a cache is damaged or not one of this run's, and there is no `repair`.
    """

    def known(m: Model) -> Model:
        try:
            if m.cache is not None:
                for name, how in damage(Path(m.cache), read_manifest(Path(m.cache))["files"]).items():
                    raise ValueError(f"{Path(m.cache) / name}: {how}")
                admit(m)
            return m
        except ValueError as error:
            if not repair:
                raise ValueError(
                    f"{error}; leave away its `cache`, or start with --repair, to capture it here"
                ) from None
            return _without(m, error)

    return _with(config, known)


def readable(config: Config) -> Config:
    """The config, without those of its caches that cannot be told from anything else."""

    def known(m: Model) -> Model:
        try:
            if m.cache is not None:
                read_manifest(Path(m.cache))
            return m
        except (ValueError, OSError) as error:
            return _without(m, f"{m.name}: {error}")

    return _with(config, known)


def _without(m: Model, why: object) -> Model:
    tracking.say(f"{why}: it is captured here")
    return replace(m, cache=None)


def _with(config: Config, known: Callable[[Model], Model]) -> Config:
    return replace(config, pivot=known(config.pivot), sources=tuple(map(known, config.sources)))
