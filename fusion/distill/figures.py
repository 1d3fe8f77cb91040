"""What is told of a training: losses, who taught how much, speed, memory, time spent waiting for batches."""

import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from fusion import cluster, tracking


class Figures:
    """Sums over the steps since they were last told, and over all of them; kept on the device, so that none waits.

    Args:
        teachers: their names.
    """

    def __init__(self, teachers: Sequence[str], device: torch.device):
        self._teachers = list(teachers)
        # per teacher, and for the positions that none teaches: positions, Σ fusion loss; last: positions, Σ label loss
        self._sums = torch.zeros((len(teachers) + 2, 2), dtype=torch.float64, device=device)
        self._all = np.zeros(self._sums.shape)
        self._tokens = 0.0
        self._waited = self._waited_in_all = self._spent_in_all = 0.0
        self._since = time.monotonic()

    def add(self, teacher: torch.Tensor, label_loss: torch.Tensor, fusion_loss: torch.Tensor, tokens: int) -> None:
        """Count a batch: number of the teacher of each position, -1 for none, and its losses in nats."""
        n = len(self._teachers)
        who = torch.where(teacher < 0, n, teacher)
        taught = torch.where(teacher < 0, 0, fusion_loss.double())  # where none teaches it is no number to speak of
        self._sums[:, 0].index_add_(0, who, torch.ones_like(taught))
        self._sums[:, 1].index_add_(0, who, taught)
        self._sums[n + 1, 0] += len(teacher)
        self._sums[n + 1, 1] += label_loss.double().sum()
        self._tokens += tokens

    def waited(self, seconds: float) -> None:
        """Count time in which a step waited for its batches."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Do not count time that went into something else than steps."""
        self._since += seconds

    def take(self) -> dict[str, float]:
        """The figures since the last time, over all ranks; every rank must ask."""
        sums, now = self._gathered(), time.monotonic()
        spent = max(now - self._since, 1e-9)
        found = {
            **self._told(sums),
            "tokens_per_second": round(sum(cluster.gather(self._tokens)) / spent, 1),
            "data_wait_share": round(self._waited / spent, 5),
            "memory_gb": round(memory_gb(), 3),
        }
        self._waited_in_all += self._waited
        self._spent_in_all += spent
        self._tokens, self._waited, self._since = 0.0, 0.0, now
        return found

    def sums(self) -> list[list[float]]:
        """What all figures have come to, on all ranks together, to go on from; every rank must ask."""
        found: np.ndarray = self._all + np.sum(cluster.gather(self._sums.cpu().numpy()), axis=0)
        return [[float(value) for value in row] for row in found]

    def go_on(self, sums: list[list[float]]) -> None:
        """Begin with what `sums` said at a checkpoint."""
        self._all = np.array(sums)

    def summary(self) -> dict[str, float]:
        """Figures over all steps; the share of time spent waiting, over those of this process."""
        self._gathered()
        spent = self._spent_in_all + time.monotonic() - self._since
        waited = (self._waited_in_all + self._waited) / max(spent, 1e-9)
        return {**self._told(self._all), "positions": int(self._all[-1, 0]), "data_wait_share": round(waited, 5)}

    def _gathered(self) -> np.ndarray:
        sums: np.ndarray = np.sum(cluster.gather(self._sums.cpu().numpy()), axis=0)
        self._sums.zero_()
        self._all += sums
        return sums

    def _told(self, sums: np.ndarray) -> dict[str, float]:
        positions = max(sums[-1, 0], 1)
        figures = {"label_loss": sums[-1, 1] / positions, "taught_share": sums[:-2, 0].sum() / positions}
        for name, (count, loss) in zip(self._teachers, sums[:-2], strict=True):
            figures[f"taught_by/{name}"] = count / positions
            if count:
                figures[f"fusion_loss/{name}"] = loss / count
        return {name: round(float(value), 5) for name, value in figures.items()}


def memory_gb() -> float:
    """Peak memory of this process: the GPU's where there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Progress(TrainerCallback):
    """A bar over steps."""

    def __init__(self, title: str, steps: int):
        self._bar, self._note = tracking.Bar(title, steps), ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more."""
        self._bar.advance(note=self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest figures for the bar."""
        if logs and "label_loss" in logs:
            taught = [
                f"{name.partition('/')[2]} {logs[name]:.3f}" for name in sorted(logs) if name.startswith("fusion_loss/")
            ]
            parts = [
                f"label loss {logs['label_loss']:.3f}",
                *([f"fusion loss {', '.join(taught)} on {logs['taught_share']:.0%}"] if taught else []),
                f"{logs['tokens_per_second']:,.0f} tokens/s",
                f"{logs['memory_gb']:.1f} GB",
            ]
            self._note = ", ".join(parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        self._bar.close()
