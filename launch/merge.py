"""Merge checkpoints by a recipe, ours or mergekit's: `python launch/merge.py RECIPE OUT`."""

import argparse
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from fusion.merge.engine import MergePlan, TensorReport, merge, plan
from fusion.merge.recipe import MergeRecipe, load_recipe

EXAMPLE = """example:
  cat > recipe.yaml <<END
  method: sce
  base: models/pivot
  models: [models/target-a, models/target-b]
  parameters: {tau: 0.1}
  dtype: bfloat16
  END
  python launch/merge.py recipe.yaml fused --plan    # what it would read, write and hold; writes nothing
  python launch/merge.py recipe.yaml fused
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 where the user or the disk is in the way, with one line on stderr."""
    parser = argparse.ArgumentParser(
        description="Merge checkpoints by a recipe; a mergekit recipe in its plain form works unchanged.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("out", metavar="OUT", help="folder for the merged model; must not exist or be empty")
    parser.add_argument("--plan", action="store_true", help="check everything, print the plan and stop")
    chosen = parser.parse_args(arguments)
    try:
        recipe = load_recipe(chosen.recipe)
        planned = plan(recipe)
        console = Console()
        _print_plan(console, planned)
        if not chosen.plan:
            reports = _merge_with_bar(recipe, planned, chosen.out)
            console.print(_coefficients(reports, recipe.models))
            console.print(f"{len(reports)} tensors in {chosen.out}", highlight=False, markup=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _print_plan(console: Console, planned: MergePlan) -> None:
    console.print(
        f"{len(planned.tensors)} tensors, {sum(tensor.numel for tensor in planned.tensors):,} parameters: "
        f"read {_size(planned.bytes_to_read)}, write {_size(planned.bytes_to_write)}, "
        f"hold up to {_size(planned.peak_memory_bytes)} in memory",
        highlight=False,
        soft_wrap=True,
    )


def _merge_with_bar(recipe: MergeRecipe, planned: MergePlan, out: str) -> list[TensorReport]:
    columns = (
        TextColumn("merge"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where nobody watches, a bar is noise around the one line that an error is.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merge", total=planned.bytes_to_read)
        return merge(recipe, out, on_tensor=lambda report: progress.advance(task, report.bytes_read))


def _coefficients(reports: Sequence[TensorReport], models: Sequence[str]) -> Table:
    """The mean coefficient of each model in each layer, a layer being the first number in a tensor's name."""
    layers: dict[int | None, list[tuple[float, ...]]] = {}
    for report in reports:
        number = re.search(r"\.(\d+)\.", report.name)
        if report.coefficients:
            layers.setdefault(int(number[1]) if number else None, []).append(report.coefficients)
    table = Table("layer", title="mean coefficients")
    for model in models:
        table.add_column(model.rstrip("/").rpartition("/")[2], justify="right")
    for layer in sorted(layers, key=lambda layer: (layer is None, layer)):
        means = [sum(column) / len(layers[layer]) for column in zip(*layers[layer], strict=True)]
        table.add_row("others" if layer is None else str(layer), *(f"{mean:.4f}" for mean in means))
    return table


def _size(count: float) -> str:
    """Bytes for people: 1,500,000 is 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    sys.exit(main())
