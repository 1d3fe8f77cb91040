"""Measure language models of any tokenizer side by side: bits per byte on any text or chats, and tasks.

python launch/evaluate.py runs/demo/fused build/demo/models/pivot --data build/demo/corpus/heldout.jsonl
python launch/evaluate.py runs/demo/fused meta-llama/Llama-2-7b-hf --tasks gsm8k arc_easy --fewshot 5
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from fusion import cluster


def main() -> int:
    """Read the command line, measure; 0 when all went well, 2 for what the user can mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, that a log would hold line by line
    arguments = _parse()
    try:
        return 0 if _measure(arguments) else 2
    except (ValueError, OSError) as error:
        return cluster.fail(error)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids")
    parser.add_argument("--limit", type=int, help="the first so many rows of --data, and questions of each task")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--json", metavar="OUT", help="write the figures")
    parser.add_argument(
        "--wandb",
        nargs="?",
        const="auto",
        default="disabled",
        choices=("auto", "online", "offline"),
        help="a run of wandb for each model (auto: online with an API key, else offline)",
    )
    parser.add_argument("--project", default="fusion", help="of wandb (default: fusion)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    bits = parser.add_argument_group("bits per byte")
    bits.add_argument("--data", help="a .jsonl, .parquet or .csv file, a folder or a hub dataset")
    bits.add_argument("--domain", help="one name for all rows; else the row's domain or source")
    bits.add_argument("--split", default="train", help="of a hub dataset (default: train)")
    bits.add_argument("--subset", help="of a hub dataset")
    bits.add_argument("--template", default="own", help="for chats: own, plain or a Jinja file")
    bits.add_argument("--batch-tokens", type=int, default=8192, help="tokens read at once (default: 8192)")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'fusion[eval]')")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", default=[], help="their names, groups, or files (.yaml)")
    tasks.add_argument("--fewshot", type=int, help="worked examples before a question (default: as the task says)")
    tasks.add_argument("--batch-size", type=int, default=8, help="questions at once (default: 8)")
    tasks.add_argument("--chat", action="store_true", help="ask in the model's own chat template")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace) -> bool:
    """Measure and show the models, each a row; whether all of them were measured.

    What the user can have got wrong is found before the first.
    """
    import transformers

    from fusion import hub, tracking
    from fusion.config import Model
    from fusion.measure import bits_per_byte
    from fusion.release import tasks

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _check(arguments)
    models = [
        Model(m, name=f"model-{n}", dtype=arguments.dtype, template=arguments.template)
        for n, m in enumerate(arguments.models, 1)
    ]
    rows: list[dict[str, Any]] = []
    finished = 0
    with cluster.joined():  # a machine may have to download what another one has
        folders = [hub.locate(model, model.model) for model in models]
        for model, folder in zip(models, folders, strict=True):
            hub.template_of(model)
            if arguments.chat and hub.load_tokenizer(model, folder).chat_template is None:
                raise ValueError(f"--chat: {model.model} has no chat template")
        samples = _samples(arguments) if arguments.data else []
        known = tasks.manager(arguments.tasks) if arguments.tasks else None
        asked = (arguments.fewshot, arguments.limit, arguments.batch_size, arguments.chat)
        try:  # what was measured stays, whatever comes next
            for model, folder in zip(models, folders, strict=True):
                with _tracker(arguments, model.model) as tracker:
                    row: dict[str, Any] = {"model": model.model, "settings": _settings(arguments)}
                    if samples:
                        bits = bits_per_byte(model, folder, samples, arguments.batch_tokens)
                        row |= {"bits_per_byte": bits, "mean": sum(bits.values()) / len(bits)}
                        rows.append(row)
                        _write(arguments, rows)
                        tracker.log(_bits(row))
                    if known is not None:
                        found = tasks.scores(known, arguments.tasks, model, folder, *asked)
                        row["tasks"] = {
                            task: {
                                metric: {"value": value, "stderr": error} for metric, (value, error) in metrics.items()
                            }
                            for task, metrics in found.items()
                        }
                        if not samples:
                            rows.append(row)
                        _write(arguments, rows)
                        tracker.log(_scores(row))
                    finished += 1
        except KeyboardInterrupt:
            tracking.say(f"interrupted after {finished} of {len(models)} models")
        finally:
            _show(rows)
    return finished == len(models)


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.data and not arguments.tasks:
        raise ValueError("nothing to measure by: give --data or --tasks")
    for option, least in (("limit", 1), ("fewshot", 0), ("batch_size", 1), ("batch_tokens", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')}: {value} will not do; give {least} or more")
    if arguments.json and Path(arguments.json).is_dir():
        raise ValueError(f"--json {arguments.json}: is a folder; give a file")
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        raise ValueError(f"--json {arguments.json}: there is no folder {Path(arguments.json).resolve().parent}")


def _samples(arguments: argparse.Namespace) -> list[Any]:
    from data_prep.samples import read_rows, to_sample
    from fusion.config import Dataset

    samples = []
    for where, row in read_rows(Dataset(arguments.data, split=arguments.split, subset=arguments.subset), "--data"):
        sample = to_sample(row, where, arguments.domain)
        if sample is not None:
            samples.append(sample)
        if len(samples) == arguments.limit:
            break
    if not samples:
        raise ValueError(f"--data: {arguments.data} has no rows to measure on")
    return samples


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on beside the model."""
    names = ["limit", "dtype", *(["data", "split", "subset", "domain", "template"] if arguments.data else [])]
    names += ["tasks", "fewshot", "chat"] if arguments.tasks else []
    return {name: getattr(arguments, name) for name in names}


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.json and cluster.is_main():
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


def _tracker(arguments: argparse.Namespace, model: str) -> Any:
    from fusion.config import Tracking
    from fusion.tracking import Tracker

    settings = Tracking(arguments.wandb, arguments.project)
    return Tracker.of(settings, model, "evaluate", Path("runs/evaluate"), _settings(arguments))


def _bits(row: dict[str, Any]) -> dict[str, float]:
    told = {f"bits per byte/{domain}": bits for domain, bits in row["bits_per_byte"].items()}
    return {**told, "bits per byte": row["mean"]}


def _scores(row: dict[str, Any]) -> dict[str, float]:
    return {f"{task}/{metric}": s["value"] for task, metrics in row["tasks"].items() for metric, s in metrics.items()}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from fusion import tracking

    if rows and "mean" in rows[0]:
        table = Table(title="bits per byte (lower is better)", title_justify="left")
        table.add_column("model", overflow="fold")
        domains = list(rows[0]["bits_per_byte"])
        for name in (*domains, "mean"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(row["model"], *(f"{row['bits_per_byte'][d]:.4f}" for d in domains), f"{row['mean']:.4f}")
        tracking.show(table)
    every = [(task, metric) for row in rows for task, found in row.get("tasks", {}).items() for metric in found]
    if every:
        table = Table(title="tasks, with standard errors", title_justify="left")
        table.add_column("task", overflow="fold")
        table.add_column("metric")
        for row in rows:
            table.add_column(row["model"], justify="right", overflow="fold")
        for task, metric in dict.fromkeys(every):
            scores = (row.get("tasks", {}).get(task, {}).get(metric) for row in rows)
            table.add_row(task, metric, *map(_score, scores))
        tracking.show(table)


def _score(told: dict[str, Any] | None) -> str:
    if told is None:
        return "–"
    return f"{told['value']:.4f}" + (f" ± {told['stderr']:.4f}" if told["stderr"] is not None else "")


if __name__ == "__main__":
    cluster.end(main())
