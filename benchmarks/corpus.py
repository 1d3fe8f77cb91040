"""What a large corpus takes: memory and time of `prepare`, and of a target's texts as one process reads them.

python benchmarks/corpus.py [--megabytes 50 200] [--only prepare] [--work FOLDER] [--json OUT]

Texts are windows of ../shared/text at random places, so that none is there twice. Each step is a process of its own.
"lists" is the way without files: every sample and what the tokenizer makes of it in memory.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

from data_prep import stage
from fusion.artifact import Artifact
from fusion.config import Config, Dataset, Model, Prepare
from fusion.corpus import Corpus
from fusion.distill.texts import Texts

STEPS = ("prepare", "texts", "lists")


def main() -> None:
    """Take the figures of each size."""
    parser = common.arguments("what a large corpus takes")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--target", default="llama2", help="whose tokenizer reads the texts")
    parser.add_argument("--work", type=Path, default=Path("build/benchmark-corpus"))
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    given = common.parsed(parser)
    if min(given.megabytes) < 1:
        raise ValueError(f"--megabytes {min(given.megabytes)}: give numbers from 1")
    if given.child:
        print(json.dumps(measured(given.child, given.work / str(given.megabytes[0]), given.target)))
        return
    figures = []
    for size in given.megabytes:
        make(given.work / str(size) / "corpus.jsonl", size)
        for step in (s for s in STEPS if s in given.only):
            command = [sys.executable, __file__, "--child", step, "--megabytes", str(size)]
            command += ["--work", str(given.work), "--target", given.target]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:  # it has said why
                raise SystemExit(done.returncode)
            figures.append({"megabytes": size, "step": step, **json.loads(done.stdout.splitlines()[-1])})
    common.show(
        f"a corpus in one process, {given.target}'s tokenizer",
        ("step", "MB of text", "samples", "s", "held at the start, MB", "held at the end, MB", "peak, MB"),
        [[f[name] for name in ("step", "megabytes", "samples", "seconds", "before", "held", "peak")] for f in figures],
    )
    common.write(given.json, figures)


def make(path: Path, megabytes: int) -> None:
    """JSON lines of so many megabytes, once."""
    if path.exists():
        return
    whole = "".join(sample.text or "" for sample in common.samples_of(common.TEXTS))
    order, left = random.Random(0), megabytes << 20
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        while left > 0:
            start = order.randrange(len(whole) - 4000)
            text = whole[start : start + order.randrange(500, 4000)]
            file.write(json.dumps({"text": text, "domain": "mixed"}) + "\n")
            left -= len(text.encode())
    part.rename(path)


def measured(step: str, work: Path, target: str) -> dict[str, Any]:
    """Do one step: samples, seconds, and megabytes of memory, the process's own (not a file's) and all at the peak."""
    if step != "prepare" and not (work / "train.parquet").exists():
        raise ValueError(f"--only {step}: {work} is not prepared yet; name prepare too")
    renderer = common.renderer_of(target)
    before, start = _own(), time.monotonic()
    kept: Any = None
    if step == "prepare":
        data = Prepare((Dataset(str(work / "corpus.jsonl")),), max_bytes=8000)
        facts = stage.run(
            Config("corpus", Model("p"), (Model("q", "a"),), data), {}, Artifact(work, "prepare", "", "", {}, {})
        )
        count = facts["samples"]["train"]
    elif step == "texts":
        kept = Texts.shared(Corpus(work, "train"), renderer, work / "rendered")
        count = len(kept)
        assert sum(len(kept[n].ids) for n in range(count)) == kept.tokens.sum()  # every text is read once
    else:
        samples = list(Corpus(work, "train"))
        kept = samples, [renderer.render(sample) for sample in samples]
        count = len(samples)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"samples": count, "seconds": seconds, "before": before, "held": _own(), "peak": peak}


def _own() -> float:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc does not tell what memory is the process's own")


if __name__ == "__main__":
    common.door(main)
