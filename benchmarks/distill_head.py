"""Head and loss alone: what each way takes at its peak, in a process of its own."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import dense
import torch

from fusion.distill.loss import Targets, sparse_cross_entropy

LABEL_WEIGHT = 0.5
ENTRIES = 24


def memory(device: str, size: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory and time of head and loss, forward and backward, each way in a process of its own."""
    rows = []
    for way in ("dense", "labels", "fusion"):
        command = [
            sys.executable,
            str(Path(__file__).with_name("distill.py")),
            "--child",
            way,
            "--device",
            device,
            "--size",
            *map(str, size),
        ]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    base = rows[0]["bytes"]
    common.show(
        f"head and loss, {size[0]:,} tokens of width {size[1]:,}, {size[2]:,} ids, {device}",
        ("way", "peak MB above inputs and weights", "of dense", "seconds"),
        [[r["way"], r["bytes"] / 1e6, f"1/{base / r['bytes']:.1f}", r["seconds"]] for r in rows],
    )
    return rows


def alone(way: str, device: str, size: Sequence[int]) -> dict[str, Any]:
    """One way, on made-up hidden states: bytes at the peak above what was there before, and seconds of a second run."""
    count, width, ids = size
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(ids, width, generator=draw) / width**0.5).to(device, dtype).requires_grad_()
    kept = torch.randint(0, ids // ENTRIES, (count, ENTRIES), generator=draw) + torch.arange(ENTRIES) * (ids // ENTRIES)
    probs = torch.rand(count, ENTRIES, generator=draw)
    probs = 0.9 * probs / probs.sum(-1, keepdim=True)
    labels = torch.randint(0, ids, (count,), generator=draw)
    told = Targets(labels, kept, probs, torch.full((count,), LABEL_WEIGHT))
    told = Targets(*(getattr(told, name).to(device) for name in ("labels", "ids", "probs", "label_weight")))
    step: dict[str, Callable[[], None]] = {
        "fusion": lambda: sparse_cross_entropy(hidden, weight, None, told)[0].backward(),
        "labels": lambda: torch.nn.functional.cross_entropy((hidden @ weight.T).float(), told.labels).backward(),
        "dense": lambda: _dense(hidden, weight, told),
    }
    before, peak = _memory(device, reset=True), 0
    times = []
    for _ in range(2):
        hidden.grad = weight.grad = None
        start = time.monotonic()
        step[way]()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
        peak = max(peak, _memory(device))
    return {"way": way, "bytes": peak - before, "seconds": times[-1], "size": list(size), "device": device}


def _dense(hidden: torch.Tensor, weight: torch.Tensor, told: Targets) -> None:
    logits = (hidden @ weight.T)[None]
    target = torch.zeros(logits.shape, dtype=torch.bfloat16, device=hidden.device)
    target[0].scatter_(-1, told.ids, told.probs.to(target.dtype))
    dense.loss(logits, told.labels[None], [target], [0], LABEL_WEIGHT).backward()


def _memory(device: str, reset: bool = False) -> int:
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
