"""Checkpoints of a training that was cut off: which one to go on from, and on what."""

import json
from pathlib import Path
from typing import Any

import torch

from fusion import cluster, tracking
from fusion.artifact import write_json
from fusion.config import Distill

LAYOUT = "layout.json"  # a checkpoint that has one was written to its end, by all ranks


def layout(settings: Distill) -> dict[str, Any]:
    """What DeepSpeed divides a checkpoint by."""
    told = json.loads(Path(settings.deepspeed).read_text())
    zero = int(told.get("zero_optimization", {}).get("stage", 0))
    return {"ranks": cluster.world(), "zero": zero, "lora": settings.lora is not None}


def seal(checkpoint: Path, settings: Distill) -> None:
    """Call a checkpoint finished, once every rank has written its part."""
    cluster.barrier()
    cluster.on_main(lambda: write_json(checkpoint / LAYOUT, layout(settings)))


def last_checkpoint(work: Path, settings: Distill) -> tuple[str | None, dict[str, Any] | str]:
    """The newest finished checkpoint, and the DeepSpeed settings to go on from it with.

    One of another number of ranks is made DeepSpeed's universal checkpoint first, which any number can load.

    Raises:
        ValueError: it is of another ZeRO stage, or of other ranks and holds LoRA updates: these cannot be divided anew.
    """
    found, moved = cluster.on_main(lambda: _find(work, layout(settings)))
    if not moved:
        return found, settings.deepspeed
    told = json.loads(Path(settings.deepspeed).read_text())
    return found, {**told, "checkpoint": {**told.get("checkpoint", {}), "load_universal": True}}


def _find(work: Path, wanted: dict[str, Any]) -> tuple[str | None, bool]:
    work.mkdir(parents=True, exist_ok=True)
    finished = sorted((p.parent for p in work.glob(f"checkpoint-*/{LAYOUT}")), key=lambda p: int(p.name[11:]))
    if not finished:
        return None, False
    newest = finished[-1]
    made = json.loads((newest / LAYOUT).read_text())
    if made == wanted or (made["zero"] == wanted["zero"] == 0 and made["lora"] == wanted["lora"]):
        return str(newest), False  # ZeRO-0 divides nothing
    if made["zero"] != wanted["zero"] or made["lora"] or wanted["lora"]:
        said = [f"{x['ranks']} ranks, ZeRO-{x['zero']}{', LoRA' if x['lora'] else ''}" for x in (made, wanted)]
        raise ValueError(
            f"{work} holds checkpoints of {said[0]} and this run has {said[1]}; go on as it began, "
            "or remove that folder to begin this target again"
        )
    tracking.say(f"  {newest.name} of {made['ranks']} ranks is divided anew for {wanted['ranks']}")
    cluster.make_universal(newest)
    return str(newest), True


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
