"""What the quality ladder has measured, kept in one file of JSON lines that goes with the code.

To climb all of it takes longer than one machine is to be had for. A run that another machine has recorded, with the
same config, is not trained again.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ladder
from common import SHARED
from ladder import DEEPSPEED, MIXTURE, MIXTURE_BYTES, MIXTURE_RATE, ROOT, RUNGS, Regime, Rung, Zoo
from ladder_lab import PIECES
from pydantic import TypeAdapter

from fusion import hub, pipeline
from fusion.artifact import digest
from fusion.config import Config

HERE = Path(__file__).parent / "quality.jsonl"
Row = dict[str, Any]


def config(zoo: Zoo, rung: Rung, regime: Regime, seed: int, rate: float) -> Config:
    """A run's config with names in place of one machine's paths."""
    named = zoo.named()
    tree = ladder.tree(
        rung,
        regime,
        replace(named, pivot=Path("the converged pivot")) if regime.converged else named,
        corpus=Path(f"corpus-{regime.share * rung.times:g}.jsonl"),
        heldout=Path("heldout.jsonl"),
        out=Path("runs"),
        seed=seed,
        rate=rate,
        deepspeed=DEEPSPEED.relative_to(ROOT),
    )
    return TypeAdapter(Config).validate_json(json.dumps(tree), strict=True)


def told(made: Config) -> Row:
    """What the record tells of a config: all that makes targets, the defaults of the day too."""
    whole = TypeAdapter(Config).dump_python(made, mode="json")
    return {name: held for name, held in whole.items() if name not in ("merge", "release", "tracking")}


class Record:
    """Runs by what made them.

    A run's key is made of what the pipeline would name its targets by, the stages' formats included, and of the texts:
    what would be trained or merged again in a run folder is not found here.

    Args:
        path: its file, which need not be there; None keeps nothing.
        zoo: the models.
        memory: a JSON file that remembers hashes.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None, zoo: Zoo, memory: Path):
        self._path, self._zoo = path, zoo
        models = {"pivot": zoo.pivot, **zoo.sources}
        self._prints = {name: hub.fingerprint(folder, memory) for name, folder in models.items()}
        self._fuse, heldout = (hub.fingerprint_data(str(zoo.folder / name), memory) for name in ladder.TEXTS)
        self._more = hub.fingerprint_data(str(SHARED / "text"), memory) if (SHARED / "text").is_dir() else ""
        self._how = {"heldout": heldout, "pieces": PIECES, "dtype": zoo.dtype, "merge": pipeline.STAGES["merge"][1]}
        self._rows: dict[str, Row] = {}
        self._size = 0  # of the file when it was read
        self._read_again()

    def _read_again(self) -> None:
        if self._path is None or not self._path.exists() or self._path.stat().st_size == self._size:
            return
        self._size = self._path.stat().st_size
        for number, line in enumerate(self._path.read_text().splitlines(), 1):
            try:
                held = json.loads(line)
                self._rows[held["key"]] = dict(held["row"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self._path}, line {number}: is no line of a record: {line[:40]!r}") from None

    def of_run(self, rung: Rung, regime: Regime, seed: int, rate: float) -> str:
        """What a run is found by."""
        return digest([self._how, self._targets(rung, regime, seed, rate)])

    def of_model(self, regime: Regime, name: str) -> str:
        """What the measurement of the pivot, or of a source, is found by."""
        return digest([self._how, self._read(regime)[name]])

    def _targets(self, rung: Rung, regime: Regime, seed: int, rate: float) -> list[str]:
        made = config(self._zoo, rung, regime, seed, rate)
        made = replace(made, distill=replace(made.distill, deepspeed=str(DEEPSPEED)))
        folders = {model.name: Path(model.model) for model in (made.pivot, *made.sources)}
        share = regime.share * rung.times
        more = [self._more, MIXTURE_BYTES] if regime == MIXTURE else [self._more] if share > 1 else []
        texts = [digest([self._fuse, share, *more]), str(self._how["heldout"])]
        tasks = pipeline.plan(made, pipeline.Found(folders, self._read(regime), texts))
        wanted = [t.out for t in tasks if t.out.stage == "distill"]
        return sorted(a.key for a in wanted if (a.subject == "control") == (rung.trains == "control"))

    def _read(self, regime: Regime) -> dict[str, dict[str, str]]:
        """The prints of the models of a regime; that of the converged pivot tells its training."""
        if not regime.converged:
            return self._prints
        trained = {"weights": digest(self._targets(RUNGS["labels"], MIXTURE, 0, MIXTURE_RATE))}
        return {**self._prints, "pivot": {**self._prints["pivot"], **trained}}

    def get(self, key: str) -> Row | None:
        """What is recorded, by other processes in the meantime too; None where nothing is."""
        if key not in self._rows:
            self._read_again()
        return self._rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> Row:
        """Record a run. Processes that add at once wait for each other."""
        kept: Row = _rounded(dict(row))
        if self._path is not None:
            with self._path.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell() and not self._path.read_bytes().endswith(b"\n"):  # a line that was cut off
                    file.write("\n")
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
