"""What the quality ladder has measured, kept in one file of JSON lines that goes with the code.

To climb all of it takes longer than one machine is to be had for. A run that another machine has recorded, with the
same config, is not trained again.
"""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ladder
from ladder import Regime, Rung
from ladder_lab import PIECES

from fusion.artifact import digest
from fusion.pipeline import STAGES

HERE = Path(__file__).parent / "quality.jsonl"
_READ = ("prepare", "capture", "align", "distill")  # stages whose results a run rests on
Row = dict[str, Any]


def config(rung: Rung, regime: Regime, seed: int, rate: float) -> Row:
    """A run's config as the record holds it: with names in place of one machine's paths."""
    return ladder.tree(
        rung,
        regime,
        pivot=Path("the converged pivot" if regime.converged else "../shared/zoo/pivot-llama"),
        zoo=Path("../shared/zoo"),
        corpus=Path(f"corpus-{regime.share * rung.times:g}.jsonl"),
        heldout=Path("heldout.jsonl"),
        out=Path("runs"),
        seed=seed,
        rate=rate,
        deepspeed=Path("configs/deepspeed/zero0.json"),
    )


class Record:
    """Runs by what made them.

    Args:
        path: its file, which need not be there; None keeps nothing.
        questions: of GSM8K that every model is asked.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None, questions: int = 0):
        self._path = path
        self._how = {"pieces": PIECES, "questions": questions, "formats": {name: STAGES[name][1] for name in _READ}}
        self._rows: dict[str, Row] = {}
        if path is not None and path.exists():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    held = json.loads(line)
                    self._rows[held["key"]] = held["row"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}: is no line of a record: {line[:40]!r}") from None

    def key(self, regime: Regime, made: object) -> str:
        """What a run, or an untrained model's measurement, is found by."""
        return digest([regime.name, made, self._how])

    def get(self, key: str) -> Row | None:
        """What is recorded; None where nothing is."""
        return self._rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> Row:
        """Record a run. Processes that add at once wait for each other."""
        kept: Row = _rounded(dict(row))
        if self._path is not None:
            with self._path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps({"key": key, "row": kept}, separators=(",", ":")) + "\n")
        self._rows[key] = kept
        return kept


def _rounded(value: Any) -> Any:
    """Figures to a millionth, rates as they are."""
    if isinstance(value, Mapping):
        return {name: held if name in ("rate", "config") else _rounded(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(held) for held in value]
    return round(value, 6) if isinstance(value, float) else value
