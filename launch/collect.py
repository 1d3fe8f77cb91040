"""Collect the statistics that some merge methods need: `python launch/collect.py MODEL CORPUS OUT --kind KIND`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fusion import cluster

if TYPE_CHECKING:
    from fusion.records import Sample

EXAMPLE = """example:
  python launch/collect.py models/target-a corpus.jsonl statistics/target-a --kind fisher --samples 512
  python launch/collect.py models/target-a corpus.jsonl grams/target-a --kind gram --samples 512
  python launch/collect.py models/target-a runs/target-a/checkpoint-900 moments/target-a --kind second_moments
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 where the user or the disk is in the way, with one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = _parse(arguments)
    try:
        facts = _collect(chosen)
    except (ValueError, OSError) as error:
        return cluster.fail(error)
    read = f" of {facts['samples']} samples, {facts['tokens']} tokens" if "samples" in facts else ""
    print(f"{facts['kind']}{read}: {facts['tensors']} tensors in {chosen.out}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Collect the statistics that some merge methods need of a model.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        help="rows with `text` or `messages`: a .jsonl or .parquet file, a folder or a hub dataset; "
        "for second_moments the training's optimizer.pt, or the folder of its checkpoint",
    )
    parser.add_argument("out", metavar="OUT", help="folder for statistics.safetensors; must not exist or be empty")
    parser.add_argument("--kind", required=True, help="fisher, gram or second_moments")
    parser.add_argument("--samples", type=int, default=1024, help="the first so many rows (default: 1024)")
    parser.add_argument("--length", type=int, default=2048, help="the first so many tokens of each (default: 2048)")
    parser.add_argument("--batch", type=int, default=8, help="samples of one length at a time, for gram (default: 8)")
    parser.add_argument("--labels", default="data", help="of fisher: data (default), or drawn by the model")
    parser.add_argument("--seed", type=int, default=0, help="for labels that the model draws")
    parser.add_argument("--split", default="train", help="of a hub dataset (default: train)")
    parser.add_argument("--subset", help="of a hub dataset")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--template", default="own", help="for chats: own, plain or a Jinja file")
    return parser.parse_args(arguments)


def _collect(chosen: Any) -> dict[str, str]:
    from fusion.config import Model
    from fusion.merge.collect import KINDS, Reading, collect, second_moments

    if chosen.kind not in KINDS:
        raise ValueError(f"--kind: {chosen.kind} is unknown; known are {', '.join(KINDS)}")
    if chosen.samples < 1:
        raise ValueError(f"--samples: {chosen.samples} will not do; give 1 or more")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = Model(chosen.model, name="model", dtype=chosen.dtype, template=chosen.template)
    if chosen.kind == "second_moments":
        return second_moments(model, chosen.corpus, chosen.out)
    how = Reading(chosen.length, chosen.batch, chosen.labels, chosen.seed)
    return collect(model, _samples(chosen), chosen.out, chosen.kind, how)


def _samples(chosen: Any) -> "Iterator[Sample]":
    """The first samples of the rows, blank ones left out; ValueError where there is none."""
    from itertools import islice

    from data_prep.samples import read_rows, to_sample
    from fusion.config import Dataset

    rows = read_rows(Dataset(chosen.corpus, split=chosen.split, subset=chosen.subset), "CORPUS")
    told = (sample for where, row in rows if (sample := to_sample(row, where, None)) is not None)
    first = next(told, None)
    if first is None:
        raise ValueError(f"CORPUS: {chosen.corpus} has no rows with text")
    yield first
    yield from islice(told, chosen.samples - 1)


if __name__ == "__main__":
    sys.exit(main())
