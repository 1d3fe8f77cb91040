"""Distillation: memory of head and loss, time of a step beside plain training, tokens a second beside the dense way.

python benchmarks/distill.py [--only memory step] [--device cuda] [--json OUT]

Sizes are a CPU's; on a GPU --device cuda takes bfloat16, 8,192 tokens of width 4,096 with 128,256 ids, and a model of
about a billion weights. `step` and `dense` learn from three sources of ../shared/zoo, captured and aligned for a target
with Llama 2's tokenizer first, under --work; that is done once.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common
import dense
import distill_head
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fusion import cluster, config_file, pipeline
from fusion.config import Distill
from fusion.corpus import Corpus
from fusion.distill.batch import Collator
from fusion.distill.dataset import FusionDataset
from fusion.distill.divergence import Objective
from fusion.distill.gate import Gating
from fusion.distill.loss import Shape
from fusion.distill.model import fuse_head, shape_of
from fusion.distill.stage import teacher
from fusion.distill.texts import Texts
from fusion.distill.trainer import train
from fusion.distill.validation import Validation
from fusion.tokens.render import Renderer

SIZES = {"cpu": (2048, 768, 32000), "cuda": (8192, 4096, 128256)}  # tokens, width, ids
MODELS = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16},
}
PARTS = ("memory", "step", "dense", "waiting")


def main() -> None:
    """Take the figures that were asked for."""
    parser = common.arguments("what learning from cached sources costs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", nargs=3, type=int, metavar=("TOKENS", "WIDTH", "IDS"), help="of `memory`")
    parser.add_argument("--layers", type=int, help="of the model that steps")
    parser.add_argument("--width", type=int, help="of the model that steps, in heads of 64")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark-distill"), help="folder of caches and maps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = common.parsed(parser)
    size = tuple(given.size or SIZES[given.device])
    if given.child:
        print(json.dumps(distill_head.alone(given.child, given.device, size)))
        return
    figures: dict[str, Any] = {}
    if "memory" in given.only:
        figures["memory"] = distill_head.memory(given.device, size)
    if "step" in given.only:
        figures["step"] = steps(given, ("labels", "fusion", "fusion, packed"))
    if "dense" in given.only:
        figures["dense"] = steps(given, ("dense", "fusion", "fusion, packed"))
    if "waiting" in given.only:
        figures["waiting"] = waiting(given)
    common.write(given.json, figures)


def steps(given: argparse.Namespace, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds a step and tokens a second, each round on samples of its own; the ways take turns."""
    dataset, folder = material(given)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    runs = {way: _Run(way, folder, dataset, given.device, dtype) for way in ways}
    order = np.random.default_rng(0).permutation(len(dataset))
    rounds = [order[n * given.batch : (n + 1) * given.batch] for n in range(given.rounds + 1)]
    taken: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for number, chosen in enumerate(rounds):
        for way in ways:
            spent, tokens = runs[way].step([int(n) for n in chosen])
            if number:  # the first warms up
                taken[way].append((spent, tokens))
    first = taken[ways[0]]
    rows = []
    for way in ways:
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(taken[way], first, strict=True)]
        rows.append(
            {
                "way": way,
                "seconds": median(spent for spent, _ in taken[way]),
                "tokens_per_second": sum(t for _, t in taken[way]) / sum(s for s, _ in taken[way]),
                "time_ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "building_share": runs[way].building / runs[way].spent,
            }
        )
    count = sum(p.numel() for p in next(iter(runs.values())).model.parameters())
    lengths = dataset.lengths()[np.concatenate(rounds[1:])]
    common.show(
        f"a step of {given.batch} samples of {np.mean(lengths):.0f} tokens, {count / 1e6:.0f} million weights, "
        f"{len(dataset.renderer.table):,} ids, {len(dataset.teachers)} sources, {given.device}",
        ("way", "seconds", "tokens/s", f"time / {ways[0]}", "lowest", "highest", "building batches"),
        [
            [
                r["way"],
                r["seconds"],
                r["tokens_per_second"],
                r["time_ratio"],
                r["lowest"],
                r["highest"],
                f"{r['building_share']:.1%}",
            ]
            for r in rows
        ],
    )
    return rows


def waiting(given: argparse.Namespace) -> dict[str, float]:
    """The share of the steps' time in which the trainer waited for batches that workers build from caches and maps."""
    cluster.start()
    dataset, folder = material(given, 40 * given.batch)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    told = Distill(
        batch_size=given.batch,
        per_rank=given.batch,
        evaluations=0,
        epochs=4 * given.rounds / (len(dataset) // given.batch),
        deepspeed=str(Path(__file__).parents[1] / "configs/deepspeed/zero0.json"),
    )
    with tempfile.TemporaryDirectory() as work:
        trainer, figures = train(
            lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            dataset,
            Validation((), dataset.renderer, None, 1),
            told,
            0,
            Path(work),
            _Unheard(),  # type: ignore[arg-type]
            "train",
            given.rounds,
        )
        shares = [e["data_wait_share"] for e in trainer.state.log_history if "data_wait_share" in e]
    found = {"in all": figures["data_wait_share"], "first steps": shares[0], "then": median(shares[1:])}
    common.show(
        f"time spent waiting for batches, {figures['steps']} steps in the trainer, {given.device}",
        tuple(found),
        [[f"{share:.2%}" for share in found.values()]],
    )
    return found


class _Unheard:
    def log(self, values: Any, step: int | None = None) -> None:
        """Nobody tracks a benchmark."""


class _Run:
    """One way to train a model, with an optimizer of its own; batches are built in this process, within the time."""

    def __init__(self, way: str, folder: Path, dataset: FusionDataset, device: str, dtype: torch.dtype):
        self._way, self._dataset, self._device = way, dataset, device
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
        if way.startswith("fusion"):
            shape: Shape = shape_of(self.model, len(dataset.renderer.table))
            fuse_head(self.model, Objective(), shape)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self._collator = Collator("rows" if way.endswith("packed") else "none")
        self.building = self.spent = 0.0

    def step(self, chosen: list[int]) -> tuple[float, int]:
        """Train on some samples: seconds, and tokens without padding."""
        tokens = int(self._dataset.lengths()[chosen].sum())
        self._dataset._built.clear()
        self._dataset.share_memory(1)
        prepared = self._entries(chosen) if self._way == "dense" else None
        start = time.monotonic()
        loss = self._loss(chosen, prepared)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device == "cuda":
            torch.cuda.synchronize()
        spent = time.monotonic() - start
        self.spent += spent
        return spent, tokens

    def _loss(self, chosen: list[int], prepared: list[list[dense.Entries]] | None) -> torch.Tensor:
        start = time.monotonic()
        if self._way.startswith("fusion"):
            batch = self._collator([self._dataset[n] for n in chosen])
            self.building += time.monotonic() - start
            count = len(batch["labels"])
            share = 1 - (1 - distill_head.LABEL_WEIGHT) * batch.pop("confidence")
            told = {k: v.to(self._device) for k, v in batch.items() if k not in ("teacher", "sample", "tokens")}
            total, _, _ = self.model(**told, label_weight=share.to(self._device))
            return total / count  # type: ignore[no-any-return]
        rendered = [self._dataset.rendered(n) for n in chosen]
        longest = max(len(r.ids) for r in rendered)
        ids = torch.zeros((len(chosen), longest), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, r in enumerate(rendered):
            at = np.flatnonzero(r.carries)
            ids[row, : len(r.ids)], mask[row, : len(r.ids)] = torch.from_numpy(r.ids).long(), 1
            labels[row, at + 1] = ids[row, at + 1]
        targets = []
        if prepared is not None:
            targets = [t.to(self._device) for t in dense.collate(prepared, longest, self.model.config.vocab_size)]
        self.building += time.monotonic() - start
        ids, mask, labels = (t.to(self._device) for t in (ids, mask, labels))
        if prepared is None:
            return self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return dense.loss(logits, shifted, targets, [0] * len(chosen), distill_head.LABEL_WEIGHT)

    def _entries(self, chosen: list[int]) -> list[list[dense.Entries]]:
        """What the published caches hold: aligned entries of the pivot and of every source, at each position.

        The pivot's are the first source's once more: only their number counts here.
        """
        out = []
        for n in chosen:
            said = [self._aligned(n, name) for name in range(len(self._dataset.teachers))]
            out.append([said[0], *said])
        return out

    def _aligned(self, n: int, source: int) -> dense.Entries:
        example = self._of(source)[n]
        entries: dense.Entries = [([], []) for _ in range(len(example.ids))]
        t = example.taught
        for row, at in enumerate(example.at):
            part = slice(t.offsets[row], t.offsets[row + 1])
            entries[at] = (t.ids[part].tolist(), t.probs[part].tolist())
        return entries

    def _of(self, source: int) -> FusionDataset:
        alone = object.__new__(FusionDataset)
        alone.__dict__.update(self._dataset.__dict__, teachers=[self._dataset.teachers[source]], _built={})
        return alone


def material(given: argparse.Namespace, limit: int | None = None) -> tuple[FusionDataset, Path]:
    """A target's dataset with three cached sources, and a model of its vocabulary with weights drawn at random.

    Args:
        limit: samples, None for all.
    """
    settings = dict(MODELS[given.device])
    if given.layers:
        settings["num_hidden_layers"] = given.layers
    if given.width:
        settings |= {"hidden_size": given.width, "num_attention_heads": given.width // 64}
        settings["intermediate_size"] = given.width * 43 // 16  # as in the default model
    tokenizer = AutoTokenizer.from_pretrained(common.folder_of("llama2"))
    folder = given.work / f"pivot-{settings['hidden_size']}-{settings['num_hidden_layers']}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        told = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, **settings
        )
        LlamaForCausalLM(told).to(torch.bfloat16 if given.device == "cuda" else torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tree = {
        "name": "benchmark",
        "out": str(given.work / "run"),
        "pivot": {"model": str(folder)},
        "sources": [{"name": m.partition("-")[0], "model": str(common.folder_of(m))} for m in common.OWN],
        "prepare": {
            "data": [
                {"data": str(path), "domain": path.stem.partition("_")[0], "limit": 30 + 10 * given.batch}
                for path in common.TEXTS
            ],
            "max_bytes": 2000,
        },
        "capture": {"too_long": "skip"},
        "distill": {"topology": "joint", "pivot": "absent", "gate": "all"},
        "tracking": {"wandb": "disabled"},
    }
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "config.yaml"
    path.write_text(json.dumps(tree))
    config = config_file.load(path)
    pipeline.run(config, only=("prepare", "capture", "align"))
    task = next(t for t in pipeline.plan(config, pipeline.find(config)) if t.out.label == "distill/joint")
    renderer = Renderer(tokenizer, "pivot", "own")
    teachers = [
        teacher(name.removeprefix("cache/"), task.inputs, config, renderer)
        for name in task.inputs
        if name.startswith("cache/")
    ]
    texts = Texts.of(itertools.islice(Corpus(task.inputs["prepare"], "train"), limit), renderer)
    return FusionDataset(texts, teachers, Gating("min_ce"), config.distill.k, 2048), folder


if __name__ == "__main__":
    common.door(main)
