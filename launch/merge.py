"""Merge checkpoints by a recipe, ours or mergekit's: `python launch/merge.py RECIPE OUT`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fusion import cluster
from fusion.merge.engine import MergePlan, plan
from fusion.merge.outcome import write
from fusion.merge.pools import TensorReport
from fusion.merge.recipe import MergeRecipe, load_recipe
from fusion.merge.report import summary, write_report
from fusion.merge.writer import check_new

EXAMPLE = """example:
  cat > recipe.yaml <<END
  method: sce
  base: models/pivot
  models: [models/target-a, models/target-b]
  parameters: {tau: 0.1}
  dtype: bfloat16
  END
  python launch/merge.py recipe.yaml fused --plan    # what it would read, write and hold; writes nothing
  python launch/merge.py recipe.yaml fused --report fused-report
  deepspeed --num_gpus 4 launch/merge.py recipe.yaml fused    # files of the result shared out among ranks
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 where the user or the disk is in the way, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description="Merge checkpoints by a recipe; a mergekit recipe works unchanged.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("out", metavar="OUT", help="folder for the merged model; must not exist or be empty")
    parser.add_argument("--plan", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("--report", metavar="FOLDER", help="write the merge report there: tables and pictures")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: all cores)")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu (default), cuda, cuda:1, …")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed says it; RANK counts
    chosen = parser.parse_args(arguments)
    try:
        if chosen.threads is not None and chosen.threads < 1:
            raise ValueError(f"--threads {chosen.threads}: give a number from 1")
        with ExitStack() as stack:
            if cluster.world() > 1 and not chosen.plan:
                stack.enter_context(cluster.joined())
            _run(chosen)
    except (ValueError, OSError) as error:
        return cluster.fail(error)
    except KeyboardInterrupt:
        print("interrupted; the files that are finished are kept: the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _run(chosen: argparse.Namespace) -> None:
    recipe = load_recipe(chosen.recipe)
    planned = plan(recipe, threads=chosen.threads or cluster.cores())
    if chosen.plan:
        check_new(Path(chosen.out).resolve())
    if chosen.report:
        _check_report(Path(chosen.report))
    console = Console(quiet=not cluster.is_main())
    _print_plan(console, planned)
    if chosen.plan:
        return
    reports = _merge_with_bar(planned, recipe, chosen.out, _device(chosen.device))
    if not cluster.is_main():
        return
    models = planned.layout.models
    console.print(summary(reports, models))
    if chosen.report:
        facts = {"method": recipe.method, "base": recipe.base, "models": list(models), "dtype": recipe.dtype}
        write_report(reports, models, facts, Path(chosen.report))
        console.print(f"report in {chosen.report}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(reports)} tensors in {chosen.out}", highlight=False, markup=False, soft_wrap=True)


def _check_report(folder: Path) -> None:
    """Refuse what the report could not be written to, before anything is merged."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--report {folder}: the folder is not empty; give a new one")
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not above.is_dir():
        raise ValueError(f"--report {folder}: {above} is a file; give a new folder")


def _device(wanted: str) -> str:
    """A device that is there; ValueError for another. With several ranks each has its own GPU."""
    if wanted == "cpu":
        return wanted
    import torch

    try:
        device = torch.device(wanted)
        if device.type == "cuda" and device.index is None and cluster.world() > 1:
            device = torch.device("cuda", cluster.local_rank())
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted}: it cannot be used here ({str(error).splitlines()[0]})") from error
    return "cpu" if device.type == "cpu" else str(device)


def _print_plan(console: Console, planned: MergePlan) -> None:
    console.print(
        f"{len(planned.layout.jobs)} tensors, {planned.parameters:,} parameters: "
        f"read {_size(planned.bytes_to_read)}, write {_size(planned.bytes_to_write)} in {len(planned.shards)} "
        f"file{'s' * (len(planned.shards) != 1)}, hold up to {_size(planned.peak_memory_bytes)} in memory",
        highlight=False,
        soft_wrap=True,
    )


def _merge_with_bar(planned: MergePlan, recipe: MergeRecipe, out: str, device: str) -> list[TensorReport]:
    columns = (
        TextColumn("merge"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where nobody watches, a bar is noise around the one line that an error is.
    shown = console.is_terminal and cluster.is_main()
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("merge", total=planned.bytes_to_read)
        return write(recipe, planned, out, device=device, on_bytes=lambda count: progress.advance(task, count))


def _size(count: float) -> str:
    """Bytes for people: 1,500,000 is 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by who called
            stream.flush()
    os._exit(code)  # all is written and closed; torch would take most of a second to take itself apart
