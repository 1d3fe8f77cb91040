"""Release: the fused checkpoint with its card, measured against everything that went in."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fusion import cluster, hub, tracking
from fusion.artifact import Artifact, read_manifest, verify
from fusion.config import Config, Model
from fusion.corpus import Corpus
from fusion.measure import bits_per_byte, made_of
from fusion.release.card import model_card
from fusion.release.publish import check_repo, publish
from fusion.release.report import console_table, verdict, write_report
from fusion.release.summary import MergeFacts, Scored, StageFacts, Summary

_PUBLISHED = "published"  # where it is on the hub, beside the checkpoint


def check(config: Config) -> None:
    """Refuse, before anything runs, a hub repository that cannot be published to.

    Raises:
        ValueError: see `publish.check_repo`.
    """
    if config.release.hub:
        check_repo(config.release.hub)


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write `checkpoint/` (model, tokenizer, card), `report.html`, `plots/` and `results.json`.

    `inputs` holds `prepare`, `merge`, `model/NAME` for the pivot and each source, `target/NAME` for each target and the
    control, and the folders of the stages in between under their labels.
    """
    heldout = list(Corpus(inputs["prepare"], "heldout"))
    measured = [_measure(config, *entry, heldout) for entry in _models(config, inputs)]
    scored = [model for model in measured if model is not None]
    merged = read_manifest(inputs["merge"])["facts"]
    summary = Summary(
        name=config.name,
        seed=config.seed,
        models=tuple(scored),
        stages=tuple(_stage(name, path) for name, path in inputs.items() if (path / "manifest.json").exists()),
        merge=MergeFacts(
            method=merged["method"],
            parameters=merged["parameters"],
            names=tuple(merged["names"]),
            coefficients=tuple((n, tuple(c)) for n, c in merged["coefficients"]),
            updates=tuple((n, tuple(u)) for n, u in merged["updates"]),
            scale=merged["scale"],
            outside=merged["scale outside of layers"],
        ),
        continuations=cluster.on_main(lambda: _continue(config, inputs["merge"] / "model")),
        heldout={d: sum(s.domain == d for s in heldout) for d in sorted({s.domain for s in heldout})},
    )
    tracker = tracking.Tracker(config, "release")
    domains = sorted(summary.heldout)
    rows: list[list[Any]] = [[m.name, m.role, *(m.bits[d] for d in domains), m.mean] for m in scored]
    tracker.table("held-out bits per byte", ["model", "role", *domains, "mean"], rows)
    tracker.log(
        {
            f"merge_weight/{n}/{t}": w
            for t, ws in summary.merge.coefficients
            for n, w in zip(summary.merge.names, ws, strict=True)
        }
    )
    tracker.log({f"bits_per_byte/{m.name}": m.mean for m in scored})
    tracker.log(
        {f"{s.label}/{k}": v for s in summary.stages for k, v in s.facts.items() if s.label.startswith("align/")}
    )
    tracker.close()
    cluster.on_main(lambda: _write(config, inputs["merge"] / "model", summary, out))
    return {m.name: m.mean for m in summary.models}


def announce(config: Config, out: Artifact) -> None:
    """Print the table, and where checkpoint and report are; publish the checkpoint, once.

    Raises:
        ValueError: the hub does not take it; all else is finished, and the next launch does this alone.
    """
    names = {"fused": out.folder / "checkpoint", "report.html": out.folder / "report.html"}
    for name, target in names.items():
        cluster.on_main(partial(_point, config.folder / name, target))
    summary = Summary.from_json((out.folder / "results.json").read_text())
    tracking.show(console_table(summary))
    tracking.say(verdict(summary))
    tracking.say(f"report      {config.folder / 'report.html'}")
    tracking.say(f"checkpoint  {config.folder / 'fused'}")
    if config.release.hub:
        tracking.say(f"published   {cluster.on_main(partial(_published, config, out.folder))}")


def _published(config: Config, folder: Path) -> str:
    """Where the checkpoint is on the hub; uploaded where it was not yet, whole."""
    told = folder / _PUBLISHED
    if not told.exists():
        verify(folder, but=["checkpoint/README.md"])  # a card may be edited first
        told.write_text(publish(folder / "checkpoint", str(config.release.hub), config.release.private))
    return told.read_text()


def _models(config: Config, inputs: Mapping[str, Path]) -> list[tuple[str, Model, Path]]:
    """(role, model, folder) of everything that is measured; all with the pivot's dtype or their own."""
    # a source whose cache was given is not measured: its weights need not be here
    found = [("source", s, inputs[f"model/{s.name}"]) for s in config.sources if f"model/{s.name}" in inputs]
    found.append(("pivot", config.pivot, inputs["model/pivot"]))
    names = [name.removeprefix("target/") for name in inputs if name.startswith("target/")]
    made = [("control" if n == "control" else "target", n, inputs[f"target/{n}"] / "model") for n in names]
    made.append(("fused", "fused", inputs["merge"] / "model"))
    order = ("control", "target", "fused")
    for role, name, folder in sorted(made, key=lambda m: order.index(m[0])):
        label = f"target {name}" if role == "target" else name
        found.append((role, made_of(config.pivot, folder, label.replace(" ", "-")), folder))
    return found


def _measure(config: Config, role: Any, model: Model, folder: Path, heldout: list) -> Scored | None:
    """None for a source that has no figure: with `capture.on_nonfinite: skip` it may have taught all the same."""
    bits = bits_per_byte(model, folder, heldout, config.release.batch_tokens)
    mean = sum(bits.values()) / len(bits)
    if role == "source" and not math.isfinite(mean):
        where = ", ".join(domain for domain, value in bits.items() if not math.isfinite(value))
        tracking.say(f"  {model.name}: its logits are not finite on held-out samples ({where}); it is not shown")
        return None
    settings = json.loads((folder / "config.json").read_text())
    architecture = (settings.get("architectures") or ["?"])[0]
    return Scored(model.name, role, bits, mean, hub.count_parameters(folder), architecture, model.model)


def _stage(name: str, path: Path) -> StageFacts:
    manifest = read_manifest(path)
    label = f"{manifest['stage']}/{manifest['subject']}" if manifest["subject"] else manifest["stage"]
    return StageFacts(label, manifest["seconds"], manifest["facts"])


def _continue(config: Config, folder: Path) -> tuple[tuple[str, str], ...]:
    """What the fused model writes after each prompt, greedily: also proof that the checkpoint loads and generates."""
    if not config.release.prompts:
        return ()
    import torch

    model = made_of(config.pivot, folder, "fused")
    # one rank writes: where the weights need all of them, on the CPU
    device = torch.device("cpu") if model.parallel == "zero3" else cluster.device()
    tokenizer, loaded = hub.load_tokenizer(model, folder), hub.load_model(model, folder).to(device)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    written = []
    for prompt in config.release.prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids if start is None else [start, *ids]], device=device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.release.new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        written.append((prompt, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return tuple(written)


def _write(config: Config, model: Path, summary: Summary, out: Artifact) -> None:
    checkpoint = out.folder / "checkpoint"
    (out.folder / _PUBLISHED).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(model, checkpoint, copy_function=_link_or_copy)
    (checkpoint / "README.md").write_text(model_card(summary, config))
    write_report(summary, out.folder)


def _link_or_copy(source: str, target: str) -> str:
    """Weights are linked where the disk allows it, which need not keep them twice; what one may edit is copied."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(source, target)
            return target
    shutil.copy2(source, target)
    return target


def _point(link: Path, target: Path) -> None:
    """A relative symbolic link with a name that stays, renamed into place."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
