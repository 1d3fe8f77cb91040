"""Bits per byte: the one figure that models of different tokenizers share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion import cluster, hub, tracking
from fusion.config import Model
from fusion.records import Sample
from fusion.tokens.batch import by_length, pad
from fusion.tokens.render import Renderer
from fusion.tokens.windows import Window, windows


@dataclass(frozen=True)
class Reading:
    """A model's cross-entropy on n samples.

    Attributes:
        domains: n, the samples'.
        nats: float64 (n,), Σ −log p of a sample's segments.
        sizes: int64 (n,), their bytes.
    """

    domains: tuple[str, ...]
    nats: np.ndarray
    sizes: np.ndarray

    def bits(self) -> dict[str, float]:
        """Domain → bits per byte, by name; a domain without bytes has none."""
        return {d: float(self.nats[at].sum() / self.sizes[at].sum() / math.log(2)) for d, at in self._places().items()}

    def mean(self) -> float:
        """Bits per byte, the mean over domains; infinite where it is no number."""
        bits = self.bits()
        mean = sum(bits.values()) / len(bits)
        return mean if math.isfinite(mean) else math.inf

    def lead(self, other: "Reading") -> tuple[float, float]:
        """How far this is below another reading of the same samples, and the standard error of that.

        Both in bits per byte, means over domains. The error is that of a ratio estimated from pairs (Cochran 1977,
        Sampling Techniques, chapter 6): what is common to both readings of a sample is no noise. A domain of one sample
        tells nothing of its noise, and all of its difference is taken for it.
        """
        domains = self._places()
        lead = variance = 0.0
        for at in domains.values():
            difference = (other.nats[at] - self.nats[at]) / math.log(2)
            size, count = self.sizes[at].sum(), int(at.sum())
            ratio = difference.sum() / size
            rest = difference - ratio * self.sizes[at]
            lead += ratio
            variance += float((rest**2).sum()) / size**2 * count / (count - 1) if count > 1 else ratio**2
        return float(lead) / len(domains), math.sqrt(variance) / len(domains)

    def _places(self) -> dict[str, np.ndarray]:
        """Domain → bool (n,), where its samples are; those without bytes are left out."""
        names = np.array(self.domains)
        found = {d: (names == d) & (self.sizes > 0) for d in sorted(set(self.domains))}
        return {d: at for d, at in found.items() if at.any()}


def made_of(pivot: Model, folder: Path, name: str) -> Model:
    """A model of the pivot's making, to be read with the pivot's settings."""
    return replace(pivot, model=str(folder), name=name, cache=None, parameters=None)


def read(model: Model, folder: Path, samples: Iterable[Sample], batch_tokens: int) -> Reading:
    """A model's cross-entropy on the samples' segments, shared out over all ranks.

    The end of a text is not counted, and every text is preceded by the model's start token, so that each byte is.
    Samples longer than the context are read in windows that overlap by half.

    Args:
        folder: where the model is.
        batch_tokens: tokens read at once.

    Raises:
        ValueError: the model or its tokenizer does not load.
    """
    renderer = Renderer(hub.load_tokenizer(model, folder), model.name, hub.template_of(model))
    rendered = [(s.domain, renderer.render(s)) for s in samples]
    loaded = hub.load_model(model, folder).to(cluster.device())
    context = hub.context_of(folder)
    cuts = [(n, w) for n, (domain, r) in enumerate(rendered) for w in windows(domain, r, context)]
    batches = cluster.share(list(by_length(cuts, [len(w.ids) for _, w in cuts], batch_tokens)))
    nats = np.zeros(len(rendered))
    for batch in tracking.progress(batches, f"measure {model.name}", len(batches)):
        np.add.at(nats, [n for n, _ in batch], _score(loaded, [w for _, w in batch]))
    return Reading(
        tuple(domain for domain, _ in rendered),
        np.sum(cluster.gather(nats), axis=0),
        np.array([r.content_bytes for _, r in rendered], np.int64),
    )


def bits_per_byte(model: Model, folder: Path, samples: Iterable[Sample], batch_tokens: int) -> dict[str, float]:
    """Domain → bits per byte; see `read`."""
    return read(model, folder, samples, batch_tokens).bits()


@torch.inference_mode()
def _score(model: Any, batch: list[Window]) -> list[float]:
    """Σ −log p in nats over the scored content of each window."""
    ids, mask = (torch.from_numpy(array).to(cluster.device()) for array in pad([w.ids for w in batch]))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scores = []
    for row, window in enumerate(batch):
        at = torch.from_numpy(window.scored()).to(ids.device)
        total = 0.0
        for part in at.split(1024):
            logp = logits[row, part].float().log_softmax(-1).gather(-1, ids[row, part + 1, None])
            total -= float(logp.double().sum())
        scores.append(total)
    return scores
