"""Measure language models of any tokenizer side by side: bits per byte on any text or chats.

python launch/evaluate.py runs/demo/fused build/demo/models/pivot --data build/demo/corpus/heldout.jsonl
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Read the command line, measure; 0 when all went well, 2 for what the user can mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = _parse()
    try:
        rows = _measure(arguments)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _show(rows)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids")
    parser.add_argument("--data", required=True, help="a .jsonl or .parquet file, a folder or a hub dataset")
    parser.add_argument("--domain", help="one name for all rows; else the row's domain or source")
    parser.add_argument("--split", default="train", help="of a hub dataset (default: train)")
    parser.add_argument("--limit", type=int, help="the first so many rows")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--template", default="own", help="for chats: own, plain or a Jinja file")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens read at once (default: 8192)")
    parser.add_argument("--json", metavar="OUT", help="write the figures")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import transformers

    from data_prep.samples import read_rows, to_sample
    from fusion import cluster, hub
    from fusion.config import Dataset, Model
    from fusion.release.evaluate import bits_per_byte

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit: {arguments.limit} will not do; give 1 or more")
    models = [
        Model(m, name=f"model-{n}", dtype=arguments.dtype, template=arguments.template)
        for n, m in enumerate(arguments.models, 1)
    ]
    folders = [hub.locate(model, model.model) for model in models]
    samples = []
    for where, row in read_rows(Dataset(arguments.data, split=arguments.split), "--data"):
        sample = to_sample(row, where, arguments.domain)
        if sample is not None:
            samples.append(sample)
        if len(samples) == arguments.limit:
            break
    if not samples:
        raise ValueError(f"--data: {arguments.data} has no rows to measure on")
    cluster.start()
    try:
        scores = [bits_per_byte(m, f, samples, arguments.batch_tokens) for m, f in zip(models, folders, strict=True)]
    finally:
        cluster.stop()
    return [
        {"model": m.model, "bits_per_byte": b, "mean": sum(b.values()) / len(b)}
        for m, b in zip(models, scores, strict=True)
    ]


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from fusion import tracking

    table = Table(title="bits per byte (lower is better)", title_justify="left")
    table.add_column("model", overflow="fold")
    domains = list(rows[0]["bits_per_byte"])
    for name in (*domains, "mean"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["model"], *(f"{row['bits_per_byte'][d]:.4f}" for d in domains), f"{row['mean']:.4f}")
    tracking.show(table)


if __name__ == "__main__":
    sys.exit(main())
