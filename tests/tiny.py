"""What several tests write on the spot: JSON lines, samples of plain words, a config, stage folders."""

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fusion import config_file
from fusion.artifact import Artifact
from fusion.config import Config
from fusion.records import Sample, sample_id

ROOT = Path(__file__).parents[1]
_WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "two",
    "dogs",
    "went",
    "by",
    "one",
    "day",
    "12",
    "apples",
    "tea",
)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int, seed: int = 0, words: int = 12) -> list[str]:
    """Distinct texts of plain words, of 3 to `words` words each."""
    random = Random(seed)
    return [f"{n} " + " ".join(random.choices(_WORDS, k=random.randint(3, words))) for n in range(count)]


def samples(count: int, seed: int = 0, domain: str = "plain", words: int = 12) -> list[Sample]:
    """The same as whole samples."""
    return [Sample(sample_id(text), domain, text) for text in texts(count, seed, words)]


def tree(folder: Path, pivot: Path, sources: Mapping[str, Path], **sections: Any) -> dict[str, Any]:
    """A config as YAML holds it: 40 texts to train on, 8 to measure on, everything under `folder`."""
    train = write_lines(folder / "train.jsonl", ({"text": text, "domain": "plain"} for text in texts(40)))
    held = write_lines(folder / "held.jsonl", ({"text": text, "domain": "plain"} for text in texts(8, seed=1)))
    return {
        "name": "tiny",
        "out": str(folder / "run"),
        "pivot": {"model": str(pivot), "dtype": "float32"},
        "sources": [{"name": n, "model": str(path), "dtype": "float32"} for n, path in sources.items()],
        "prepare": {"data": [{"data": str(train)}, {"data": str(held), "heldout": True}]},
        "distill": {"topology": "pairwise", "pivot": "gate", "deepspeed": str(ROOT / "configs/deepspeed/zero2.json")},
        "tracking": {"wandb": "disabled"},
        **sections,
    }


def write_config(path: Path, holds: Mapping[str, Any]) -> Path:
    """A config file."""
    path.write_text(yaml.safe_dump(dict(holds), sort_keys=False))
    return path


def load(folder: Path, holds: Mapping[str, Any], *overrides: str) -> Config:
    """The config that a tree says, by way of a file."""
    return config_file.load(write_config(folder / "config.yaml", holds), overrides)


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def artifact(root: Path, stage: str, subject: str = "") -> Artifact:
    """A stage's folder that is there and holds nothing."""
    made = Artifact.planned(root, stage, subject, {}, {})
    made.folder.mkdir(parents=True)
    return made
