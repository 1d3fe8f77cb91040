"""Merge: all targets and their base → one checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion import cluster, tracking
from fusion.artifact import Artifact
from fusion.config import Config
from fusion.merge.engine import TensorReport, merge, plan
from fusion.merge.methods import get_method
from fusion.merge.recipe import MergeRecipe


def recipe(config: Config, inputs: Mapping[str, Path]) -> MergeRecipe:
    """What the config asks for; `inputs` holds `pivot` and `target/NAME` for each target."""
    models = tuple(str(path / "model") for name, path in inputs.items() if name.startswith("target/"))
    return MergeRecipe(config.merge.method, str(inputs["pivot"]), models, config.merge.parameters, config.merge.dtype)


def check(config: Config) -> None:
    """Refuse, before anything runs, a method or parameters that the merge would refuse at the end.

    Raises:
        ValueError: an unknown method or parameter, or a value out of range.
    """
    targets = 1 if config.distill.topology == "joint" else len(config.sources)
    get_method(config.merge.method).check(config.merge.parameters, targets)


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write the fused checkpoint as a Hugging Face folder `model/`.

    Raises:
        ValueError: an unknown method or parameter, or targets whose tensors are not the base's.
    """

    def work() -> dict[str, Any]:
        made = recipe(config, inputs)
        shutil.rmtree(out.folder / "model", ignore_errors=True)  # of a run that was cut off before its manifest
        with tracking.bar("merge", len(plan(made).tensors)) as bar:
            reports = merge(made, out.folder / "model", lambda report: bar.advance(note=report.name))
        return _facts(config, inputs, reports)

    return cluster.on_main(work)


def _facts(config: Config, inputs: Mapping[str, Path], reports: list[TensorReport]) -> dict[str, Any]:
    merged = [r for r in reports if r.coefficients]
    return {
        "method": config.merge.method,
        "parameters": config.merge.parameters,
        "names": [name.removeprefix("target/") for name in inputs if name.startswith("target/")],
        "coefficients": [[r.name, list(r.coefficients)] for r in merged],
        "updates": [[r.name, list(r.updates)] for r in merged],
    }
