"""Checkpoints of a training that was cut off: which one to go on from, and on what."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusion import cluster, spread, tracking
from fusion.artifact import write_json
from fusion.config import Distill
from fusion.distill.arguments import deepspeed_of

LAYOUT = "layout.json"  # a checkpoint that has one was written to its end, by all ranks


@dataclass(frozen=True)
class Begun:
    """What there is to go on from.

    Attributes:
        checkpoint: the newest finished one, None where a training begins.
        deepspeed: the DeepSpeed settings to load it with, or their file.
        sums: what figures had come to.
    """

    checkpoint: str | None
    deepspeed: dict[str, Any] | str
    sums: list[list[float]] | None = None


def layout(settings: Distill) -> dict[str, Any]:
    """What DeepSpeed divides a checkpoint by, and what its numbers are."""
    zero = int((deepspeed_of(settings).get("zero_optimization") or {}).get("stage", 0))
    dtype = cluster.precision(settings.dtype)
    return {"ranks": cluster.world(), "zero": zero, "lora": settings.lora is not None, "dtype": dtype}


def seal(checkpoint: Path, settings: Distill, sums: list[list[float]]) -> None:
    """Call a checkpoint finished, once every rank has written its part."""
    cluster.barrier()
    cluster.on_main(lambda: write_json(checkpoint / LAYOUT, {**layout(settings), "sums": sums}))


def finished(work: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted((p.parent for p in work.glob(f"checkpoint-*/{LAYOUT}")), key=lambda p: int(p.name[11:]))


def last_checkpoint(work: Path, settings: Distill) -> Begun:
    """The newest finished checkpoint; parts of unfinished ones are removed.

    One of another number of ranks is made DeepSpeed's universal checkpoint first, which any number can load.

    Raises:
        ValueError: it is of another ZeRO stage or precision, or of other ranks and holds LoRA updates: these cannot be
            divided anew.
    """
    found, moved, sums = cluster.on_main(lambda: _find(work, layout(settings)))
    if not moved:
        return Begun(found, settings.deepspeed, sums)
    told = deepspeed_of(settings)
    return Begun(found, {**told, "checkpoint": {**told.get("checkpoint", {}), "load_universal": True}}, sums)


def _find(work: Path, wanted: dict[str, Any]) -> tuple[str | None, bool, list[list[float]] | None]:
    work.mkdir(parents=True, exist_ok=True)
    whole = finished(work)
    for folder in work.glob("checkpoint-*"):
        if folder not in whole:  # else what one rank wrote would be taken for a part of the next one of that name
            shutil.rmtree(folder)
    if not whole:
        return None, False, None
    newest = whole[-1]
    made = json.loads((newest / LAYOUT).read_text())
    sums = made.pop("sums")
    if made == wanted or (made["zero"] == 0 and {**made, "ranks": wanted["ranks"]} == wanted):
        return str(newest), False, sums  # ZeRO-0 divides nothing
    if {**made, "ranks": wanted["ranks"]} != wanted or made["lora"]:
        said = [
            f"{x['ranks']} ranks, ZeRO-{x['zero']}, {x['dtype']}{', LoRA' if x['lora'] else ''}" for x in (made, wanted)
        ]
        raise ValueError(
            f"{work} holds checkpoints of {said[0]} and this run has {said[1]}; go on as it began, "
            "or remove that folder to begin this target again"
        )
    tracking.say(f"  {newest.name} of {made['ranks']} ranks is divided anew for {wanted['ranks']}")
    spread.make_universal(newest)
    return str(newest), True, sums


def own_steps(optimizer: Any) -> None:
    """Give each part of an optimizer's state a step counter of its own.

    DeepSpeed 0.19 loads a universal checkpoint under ZeRO-3 with one counter that all parts share, and Adam counts it
    up once for each of them.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for part in getattr(optimizer, "state", {}).values():
        if torch.is_tensor(part.get("step")):
            part["step"] = part["step"].clone()
