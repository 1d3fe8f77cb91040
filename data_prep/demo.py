"""`python -m data_prep.demo --out build/demo`: the offline demo's corpus, pivot and three sources, made on the spot.

Writes corpus/{pretrain,fuse,heldout}.jsonl, models/{pivot,math,code,prose}/ and models.json (held-out bits per byte).
What an earlier run with the same settings completed is kept; everything else is made again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data_prep import demo_corpus, demo_models
from data_prep.demo_corpus import DOMAINS, PARTS
from data_prep.demo_models import Recipe

MADE = "made.json"  # in every finished folder: what decided its content
WORKERS = 2
Bits = dict[str, float]  # domain → held-out bits per byte
_reports: Any = None  # in a worker: where its steps go


def publish(folder: Path, record: str, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling of ``folder``, note ``record`` in it, and put it in the folder's place."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        fill(draft)
        (draft / MADE).write_text(record, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_made(folder: Path, record: str) -> bool:
    """Whether ``folder`` was completed from exactly these settings."""
    try:
        return (folder / MADE).read_text(encoding="utf-8") == record
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def digest_of(paths: Iterable[Path]) -> str:
    """sha256 over files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_digest(*names: str) -> str:
    """sha256 of modules beside this one: what they made is made again once they change."""
    return digest_of(Path(__file__).with_name(f"{name}.py") for name in names)


def make_corpus(out: Path, sizes: demo_corpus.Sizes, seed: int, console: Console) -> Path:
    """The corpus folder under ``out``, made if it is not there; its record names this Python, whose files it holds."""
    folder = out / "corpus"
    made = {"sizes": asdict(sizes), "seed": seed, "python": platform.python_version()}
    made["code_sha256"] = code_digest("demo_corpus", "demo_math")
    record = json.dumps(made, indent=2) + "\n"

    def fill(draft: Path) -> None:
        for part, pieces in demo_corpus.build_corpus(sizes, seed).items():
            demo_corpus.write_part(draft / f"{part}.jsonl", pieces)

    if is_made(folder, record):
        console.print(f"corpus   kept: {folder}")
    else:
        console.print(f"corpus   reading Python {platform.python_version()}'s own files → {folder}")
        publish(folder, record, fill)
    return folder


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports


def make_model(recipe: Recipe, corpus: Path, folder: Path, seed: int, record: str) -> Bits:
    """Train and publish one model, measure it on the held-out part; runs in a worker of one thread, or here."""
    threads = torch.get_num_threads()
    disable_progress_bar()  # transformers' own, of one file each
    torch.set_num_threads(1)  # two models at a time, a core each: faster than two threads on small products
    texts = demo_corpus.read_part(corpus / "pretrain.jsonl")

    def report(step: int, loss: float) -> None:
        if _reports is not None and (step % 10 == 0 or step == recipe.steps):
            _reports.put((recipe.name, step, loss))

    try:
        publish(folder, record, lambda draft: demo_models.make_model(recipe, texts, seed, draft, report))
        return measure(folder, corpus)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def measure(folder: Path, corpus: Path) -> Bits:
    """Held-out bits per byte of a saved model, by domain."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    heldout = demo_corpus.read_part(corpus / "heldout.jsonl")
    return {domain: demo_models.bits_per_byte(model, tokenizer, heldout[domain]) for domain in DOMAINS}


Job = tuple[Recipe, Path, Path, int, str]  # make_model's arguments


def run_jobs(jobs: list[Job], workers: int, console: Console) -> dict[str, Bits]:
    """Make the models, ``workers`` at a time with a bar each; in this process when that is none."""
    if workers == 0 or not jobs:
        return {job[0].name: make_model(*job) for job in jobs}
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
    )
    shown = (*columns, TextColumn("loss {task.fields[loss]:.2f}"), TimeElapsedColumn())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reports,))
    with pool, Progress(*shown, console=console) as progress:
        bars = {job[0].name: progress.add_task(job[0].name, total=job[0].steps, loss=0.0, start=False) for job in jobs}
        waiting: dict[str, Future[Bits]] = {job[0].name: pool.submit(make_model, *job) for job in jobs}
        while not all(future.done() for future in waiting.values()):
            if any(future.done() and future.exception() for future in waiting.values()):
                pool.shutdown(wait=False, cancel_futures=True)
                break
            try:
                name, step, loss = reports.get(timeout=0.5)
            except Empty:
                continue
            progress.start_task(bars[name])
            progress.update(bars[name], completed=step, loss=loss)
            if step == progress.tasks[bars[name]].total:
                progress.stop_task(bars[name])
        done = [future for future in waiting.values() if future.done() and not future.cancelled()]
        for future in done:
            future.result()  # raises what a worker raised, before a cancelled one can
        return {name: future.result() for name, future in waiting.items()}


def show(bits: dict[str, Bits], console: Console) -> None:
    """The table of models by domains, the best of each domain in bold."""
    table = Table(title="held-out bits per byte")
    for heading in ("model", *DOMAINS):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in bits.items():
        best = {domain for domain in DOMAINS if row[domain] == min(other[domain] for other in bits.values())}
        cells = [f"[bold]{row[each]:.3f}[/bold]" if each in best else f"{row[each]:.3f}" for each in DOMAINS]
        table.add_row(name, *cells)
    console.print(table)


def known_bits(path: Path, digests: dict[str, str]) -> dict[str, Bits]:
    """Bits per byte of an earlier run for the models whose records are the same now."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["models"]
        return {row["name"]: row["bits_per_byte"] for row in rows if digests.get(row["name"]) == row["made_sha256"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return {}


def make_demo(
    out: Path,
    seed: int,
    recipes: Iterable[Recipe],
    sizes: demo_corpus.Sizes,
    console: Console,
    workers: int = WORKERS,
) -> dict[str, Bits]:
    """Corpus, four models and ``models.json`` under ``out``; the held-out bits per byte of each model by domain."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(out, sizes, seed, console)
    read, code = digest_of(corpus / f"{part}.jsonl" for part in PARTS), code_digest("demo_models", "demo_tokenizers")
    recipes = list(recipes)
    records = {recipe.name: demo_models.recipe_record(recipe, seed, read, code) for recipe in recipes}
    digests = {name: hashlib.sha256(record.encode()).hexdigest() for name, record in records.items()}
    bits = known_bits(out / "models.json", digests)
    jobs: list[Job] = []
    for recipe in recipes:
        folder = out / "models" / recipe.name
        if not is_made(folder, records[recipe.name]):
            console.print(f"{recipe.name:8} training {recipe.kind}, {recipe.steps} steps → {folder}")
            jobs.append((recipe, corpus, folder, seed, records[recipe.name]))
        else:
            console.print(f"{recipe.name:8} kept: {folder}")
            if recipe.name not in bits:
                bits[recipe.name] = measure(folder, corpus)
    bits |= run_jobs(jobs, workers, console)
    bits = {name: bits[name] for name in ("pivot", *DOMAINS)}
    rows = [{"name": name, "made_sha256": digests[name], "bits_per_byte": bits[name]} for name in bits]
    draft = out / ".models.json.draft"
    draft.write_text(json.dumps({"seed": seed, "models": rows}, indent=2) + "\n", encoding="utf-8")
    draft.replace(out / "models.json")
    return bits


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when all is made, 2 with one line on standard error when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description="Make the offline demo's inputs.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to make (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of word problems and training (default: 0)")
    parser.add_argument("--quick", action="store_true", help="tiny corpus and models, in seconds: for tests")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.quick:
            made = make_demo(options.out, options.seed, demo_models.QUICK_RECIPES, demo_corpus.QUICK, console, 0)
        else:
            made = make_demo(options.out, options.seed, demo_models.RECIPES, demo_corpus.Sizes(), console)
    except (OSError, ValueError, BrokenProcessPool) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    show(made, console)
    return 0


if __name__ == "__main__":
    # Where DeepSpeed is installed, transformers imports it, and it prints that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
