"""What a person sees while it runs: progress bars in the terminal, metrics in wandb. `wandb` is imported here alone."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fusion import cluster
from fusion.config import Config, Tracking

T = TypeVar("T")
console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 120)
_PATIENCE_S = 2.0


def say(text: str) -> None:
    """One line, from rank 0."""
    if cluster.is_main():
        console.print(text, soft_wrap=True)


def show(table: Table) -> None:
    """A table, from rank 0."""
    if cluster.is_main():
        console.print(table)


class Bar:
    """A progress bar on rank 0 that appears once the work has taken two seconds.

    On a terminal it is drawn in place; in a log it is a line at each tenth of the way, at most one every two seconds.
    """

    def __init__(self, title: str, total: int | None):
        self._title, self._total, self._done = title, total, 0
        self._start = self._said = time.monotonic()
        self._shown_tenth = 0
        self._progress: Progress | None = None

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` more as done; `note` is shown beside the bar."""
        self._done += by
        now = time.monotonic()
        if not cluster.is_main() or now - self._start < _PATIENCE_S:
            return
        if console.is_terminal:
            self._draw(note)
        elif now - self._said >= _PATIENCE_S and self._total:
            tenth = 10 * self._done // self._total
            if tenth > self._shown_tenth:
                self._shown_tenth, self._said = tenth, now
                left = (now - self._start) * (self._total - self._done) / self._done
                say(f"  {self._title}: {self._done}/{self._total}, {left:.0f} s left{', ' + note if note else ''}")

    def _draw(self, note: str) -> None:
        if self._progress is None:
            columns: list[ProgressColumn] = [TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn()]
            columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.start()
            self._progress.add_task(self._title, total=self._total, note="")
        self._progress.update(self._progress.task_ids[0], completed=self._done, note=note)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Bar]:
    """A `Bar` for the length of a block."""
    shown = Bar(title, total)
    try:
        yield shown
    finally:
        shown.close()


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that counts them."""
    with bar(title, total) as shown:
        for item in items:
            yield item
            shown.advance()


class Tracker:
    """Metrics of one run, to wandb. Made by all ranks together; rank 0 speaks.

    Online needs an API key; `auto` is online where there is one and wandb answers, else offline, written under the
    run's folder.

    Raises:
        ValueError: `online` was asked for and cannot be had.
    """

    def __init__(self, config: Config, group: str):
        name = f"{config.name}/{group}"
        self._start(config.tracking, name, config.name, config.folder)

    @classmethod
    def of(cls, settings: Tracking, name: str, group: str, folder: Path, asked: Mapping[str, Any]) -> "Tracker":
        """That of a run without a config: `folder` is where wandb writes, `asked` what it shows as the run's config."""
        made = cls.__new__(cls)
        made._start(settings, name, group, folder, asked)
        return made

    def _start(
        self, settings: Tracking, name: str, group: str, folder: Path, asked: Mapping[str, Any] | None = None
    ) -> None:
        self._run: Any = None
        cluster.on_main(lambda: self._begin(settings, name, group, folder, asked))

    def _begin(self, settings: Tracking, name: str, group: str, folder: Path, told: Mapping[str, Any] | None) -> None:
        asked = settings.wandb
        if asked == "disabled":
            return
        import wandb

        modes = {"auto": ["online", "offline"] if os.environ.get("WANDB_API_KEY") else ["offline"]}.get(asked, [asked])
        folder.mkdir(parents=True, exist_ok=True)
        for mode in modes:
            try:
                self._run = wandb.init(
                    project=settings.project,
                    name=name,
                    group=group,
                    dir=str(folder),
                    config=None if told is None else dict(told),
                    mode=mode,  # type: ignore[arg-type]
                    reinit="create_new",
                    settings=wandb.Settings(silent=True, console="off"),
                )
                return
            except wandb.errors.Error as error:
                why = " ".join(str(error).split())[:160]
                if mode == modes[-1]:
                    raise ValueError(f"tracking.wandb: {asked} cannot be had: {why}; set offline or disabled") from None
                say(f"wandb is not to be had online ({why}): offline")

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers at a step; what is no number is left out."""
        if self._run is not None:
            self._run.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=rows)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Finish the run, as one that failed or not."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None
