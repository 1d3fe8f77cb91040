"""What the benchmarks share: folders of ../shared by name, texts, a source's readings, tables and JSON."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from fusion.records import Heard, Message, Rendered, Sample, Sparse, sample_id
from fusion.tokens.render import Renderer
from fusion.tokens.words import space_mark, token_strings

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAIRS = (
    ("llama2", "mpt"),
    ("llama2", "gpt2"),
    ("mistral-v0.1", "qwen2.5"),
    ("llama3", "internlm2"),
    ("qwen2.5", "llama3"),
    ("phi-3", "falcon"),
)
TEXTS = tuple(SHARED / "text" / f"{n}.jsonl" for n in ("math_qa", "code_python", "prose_gutenberg"))


OWN = {"math-seedoss": TEXTS[:1], "code-neox": TEXTS[1:2], "prose-mistral": TEXTS[2:]}  # the zoo's specialists


def own_texts(model: str) -> Sequence[Path]:
    """The texts of a specialist's domain; for another model all of them."""
    return OWN.get(Path(model).name, TEXTS)


def folder_of(name: str) -> Path:
    """A tokenizer's or model's folder: a path, or its name in ../shared."""
    places = (Path(name), *(SHARED / kind / name for kind in ("tokenizers", "zoo", "models")))
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(f"{name}: no such folder, and none of that name among the shared ones")


def renderer_of(name: str, template: str = "own") -> Renderer:
    """A renderer for a folder's tokenizer; `template` as in the config, or a Jinja file."""
    from transformers import AutoTokenizer

    text = Path(template).read_text() if Path(template).is_file() else template
    return Renderer(AutoTokenizer.from_pretrained(folder_of(name)), Path(name).name, text)


def words_of(renderer: Renderer) -> list[str | None]:
    """The token strings of a vocabulary."""
    return token_strings(renderer.tokenizer, renderer.table)


def mark_of(renderer: Renderer) -> str:
    """What stands for a space in them."""
    return space_mark(words_of(renderer), renderer.table)


def samples_of(paths: Sequence[str | Path], limit: int | None = None, most: int | None = None) -> list[Sample]:
    """Texts and chats of JSON-lines files, `limit` of each domain spread over them.

    Texts are cut at `most` characters, longer chats left out.
    """
    by_domain: dict[str, list[Sample]] = {}
    for path in paths:
        with Path(path).open() as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    raise ValueError(f"{path}: is not JSON lines: {line[:40]!r}") from None
                text, turns = row.get("text"), row.get("messages") or ()
                domain = row.get("domain") or Path(path).stem
                if text:
                    text = text[:most]
                    by_domain.setdefault(domain, []).append(Sample(sample_id(text), domain, text, complete=False))
                elif turns and sum(len(m["content"]) for m in turns) <= (most or 1 << 30):
                    chat = tuple(Message(m["role"], m["content"]) for m in turns)
                    by_domain.setdefault(domain, []).append(Sample(sample_id(None, chat), domain, None, chat))
    chosen = []
    for found in by_domain.values():
        apart = max(len(found) // limit, 1) if limit else 1
        chosen += found[::apart][: limit or None]
    if not chosen:
        raise ValueError(f"{', '.join(map(str, paths))}: no row has `text` or `messages`")
    return chosen


def entries_of(renderer: Renderer, sample: Sample, k: int) -> Heard:
    """A reading with drawn entries, for speed: the token that followed, and others of the same text.

    Probabilities fall as 1 / rank^1.5 and sum to 0.95; the token that followed has a rank of its own.
    """
    random = np.random.default_rng(int(sample.id, 16) % 2**32)
    curve = 1 / np.arange(1, k + 1) ** 1.5
    curve *= 0.95 / curve.sum()
    read = renderer.render(sample)
    at = np.flatnonzero(read.carries)
    follows = read.ids[at + 1]
    common = np.unique(follows)[np.argsort(-np.unique(follows, return_counts=True)[1], kind="stable")]
    common = np.append(common, np.setdiff1d(np.flatnonzero(renderer.table.lengths > 0)[: 4 * k], common))
    ids, said = np.empty((len(at), k), dtype=np.int32), np.empty(len(at))
    for row, followed in enumerate(follows):
        pick = np.unique(common[(random.pareto(0.7, 6 * k) * 4).astype(np.int64) % len(common)])
        pick = np.append(pick, np.setdiff1d(common[: 2 * k], pick))
        pick = random.permutation(pick[pick != followed][:k])
        rank = min(int(random.pareto(1.0) * 1.5), k - 1)
        pick[rank], said[row] = followed, curve[rank]
        ids[row] = pick
    entries = Sparse(
        np.arange(len(at) + 1, dtype=np.int64) * k, ids.ravel(), np.tile(curve.astype(np.float32), len(at))
    )
    return Heard(
        follows, read.boundary[at], read.carries[at], np.log(said).astype(np.float32), entries, read.content_bytes
    )


class Source:
    """A causal model that reads texts: its next-token distributions, the k most probable of each."""

    def __init__(self, name: str, template: str = "own"):
        import torch
        from transformers import AutoModelForCausalLM

        self.name = Path(name).name
        self.renderer = renderer_of(name, template)
        self.model = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30

    def logits(self, read: Rendered, at: np.ndarray) -> Any:
        """float32 (N, V) at some positions of a text."""
        import torch

        with torch.inference_mode():
            said = self.model(torch.from_numpy(read.ids[None].astype(np.int64)).to(self.model.device)).logits[0]
            return said[torch.from_numpy(at).to(said.device)].float()

    def read(self, sample: Sample, k: int) -> Heard | None:
        """What it says of a text; None where that is longer than its context."""
        import torch

        read = self.renderer.render(sample)
        if len(read.ids) > self.context:
            return None
        at = np.flatnonzero(read.carries)
        with torch.inference_mode():
            logp = self.logits(read, at).log_softmax(-1)
            follows = read.ids[at + 1]
            said = logp[torch.arange(len(at)), torch.from_numpy(follows.astype(np.int64))].numpy()
            top, ids = logp.topk(min(k, logp.shape[1]))
        kept = top.shape[1]
        entries = Sparse(
            np.arange(len(at) + 1, dtype=np.int64) * kept,
            ids.numpy().astype(np.int32).ravel(),
            top.exp().numpy().astype(np.float32).ravel(),
        )
        return Heard(follows, read.boundary[at], read.carries[at], said, entries, read.content_bytes)


def fewer(heard: Heard, k: int) -> Heard:
    """The same reading with k entries a position."""
    width = int(np.diff(heard.entries.offsets)[0]) if len(heard.ids) else k
    if width <= k:
        return heard
    ids, probs = (a.reshape(-1, width)[:, :k].ravel() for a in (heard.entries.ids, heard.entries.probs))
    entries = Sparse(np.arange(len(heard.ids) + 1, dtype=np.int64) * k, ids, probs)
    return Heard(heard.ids, heard.boundary, heard.carries, heard.logp, entries, heard.content_bytes)


def door(main: Callable[[], None]) -> None:
    """Run a benchmark; what a user got wrong is one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; a place for the figures is asked for before they are taken."""
    given = parser.parse_args()
    if given.json is not None and not given.json.resolve().parent.is_dir():
        raise ValueError(f"--json {given.json}: there is no folder {given.json.resolve().parent}")
    return given


def arguments(about: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to a file")
    parser.add_argument("--template", default="own", help="chat template of both sides: own, plain or a Jinja file")
    return parser


def pair_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name pairs of tokenizers."""
    parser.add_argument("--target", action="append", help="a target tokenizer's folder, or its name in ../shared")
    parser.add_argument("--source", action="append", help="a source tokenizer's folder, or its name in ../shared")


def pairs_of(targets: Sequence[str] | None, sources: Sequence[str] | None) -> list[tuple[str, str]]:
    """Every target with every source, or the six pairs of the README."""
    if bool(targets) != bool(sources):
        raise ValueError("give --target together with --source or --model")
    return [(t, s) for t in targets for s in sources] if targets and sources else list(PAIRS)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, plain where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if os.isatty(1) else 160).print(table)


def machine() -> dict[str, Any]:
    """What figures are taken on: the processor as it calls itself and what torch uses of it, cores, GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    told = info.read_text() if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    found = {"processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}", "cores": os.cpu_count()}
    return {**found, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


def write(path: Path | None, figures: Any) -> None:
    """Write figures as JSON, with what they were taken on."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
        print(f"figures in {path}")
