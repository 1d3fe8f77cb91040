"""Bits per byte of a target on the validation samples while it trains."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from fusion import cluster
from fusion.records import Sample
from fusion.tokens.batch import by_length, pad
from fusion.tokens.render import Renderer
from fusion.tokens.windows import Window, windows


class Validation:
    """Samples that a target is measured on, shared out over all ranks.

    Args:
        samples: those longer than `context` are read in windows that overlap by half.
        budget: tokens read at once.
    """

    def __init__(self, samples: Iterable[Sample], renderer: Renderer, context: int | None, budget: int):
        rendered = [(s.domain, renderer.render(s)) for s in samples]
        self.bytes: dict[str, int] = {}
        for domain, r in rendered:
            self.bytes[domain] = self.bytes.get(domain, 0) + r.content_bytes
        self.bytes = {domain: size for domain, size in sorted(self.bytes.items()) if size}
        found = [w for domain, r in rendered for w in windows(domain, r, context) if len(w.scored())]
        self._batches: list[list[Window]] = list(by_length(found, [len(w.ids) for w in found], budget))

    def __len__(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def measure(self, model: Callable[..., Any]) -> dict[str, float]:
        """Domain → bits per byte. All ranks call it together, and the model equally often.

        Args:
            model: one with a fused head.
        """
        domains = list(self.bytes)
        nats = np.zeros(len(domains))
        for n in range(0, len(self._batches), cluster.world()):
            mine = n + cluster.rank()
            batch = self._batches[min(mine, len(self._batches) - 1)]  # who has none left reads along: ZeRO-3 needs all
            scores = _score(model, batch)
            if mine < len(self._batches):
                for window, score in zip(batch, scores, strict=True):
                    nats[domains.index(window.domain)] += score
        total = np.sum(cluster.gather(nats), axis=0)
        return {d: float(total[n]) / self.bytes[d] / float(np.log(2)) for n, d in enumerate(domains)}


def _score(model: Callable[..., Any], batch: list[Window]) -> list[float]:
    """Σ −log p in nats over the scored positions of each window."""
    ids, _ = pad([w.ids for w in batch])
    at = [w.scored() for w in batch]
    rows = np.concatenate([row * ids.shape[1] + places for row, places in enumerate(at)])
    labels = torch.from_numpy(ids.ravel()[rows + 1])
    nothing = torch.zeros((len(rows), 1))
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "rows": torch.from_numpy(rows),
        "labels": labels,
        "taught_ids": nothing.long(),
        "taught_probs": nothing,
        "label_weight": torch.ones(len(rows)),
        "weight": torch.ones(len(rows)),
    }
    _, losses, _ = model(**{name: tensor.to(cluster.device()) for name, tensor in inputs.items()})
    return [float(part.double().sum()) for part in losses.float().cpu().split([len(places) for places in at])]
