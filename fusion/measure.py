"""Bits per byte: the one figure that models of different tokenizers share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from fusion import cluster, hub, spread, tracking
from fusion.config import Model
from fusion.records import Sample
from fusion.tokens.batch import by_length, pad
from fusion.tokens.render import Renderer
from fusion.tokens.windows import Window, windows


@dataclass(frozen=True, eq=False)
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
        return {d: float(self.nats[at].sum() / self.sizes[at].sum() / math.log(2)) for d, at in self._places()}

    def mean(self) -> float:
        """Bits per byte, the mean over domains; infinite where it is no number.

        Raises:
            ValueError: there are no bytes at all.
        """
        bits = self.bits()
        if not bits:
            raise ValueError("no sample has bytes to measure on")
        mean = sum(bits.values()) / len(bits)
        return mean if math.isfinite(mean) else math.inf

    def lead(self, other: "Reading") -> tuple[float, float]:
        """How far this is below another reading of the same samples, and the margin within which that may be noise.

        Both in bits per byte, means over domains. What is hard about a sample for both is no noise. The margin is half
        of a 95 % confidence interval: Student's t by Welch's degrees of freedom, times the standard error of a ratio by
        the jackknife (Cochran 1977, Sampling Techniques, chapter 6). A domain of one sample does not tell its noise,
        and makes the margin infinite. Each sample is taken for a draw of its own: where a domain's samples are pieces
        of a few documents, which are alike, the true margin is wider.

        Raises:
            ValueError: the readings are of other samples.
        """
        if self.domains != other.domains or not np.array_equal(self.sizes, other.sizes):
            raise ValueError("readings of other samples cannot be compared")
        leads, variances, freedoms = [], [], []
        for _, at in self._places():
            bits, sizes = (other.nats[at] - self.nats[at]) / math.log(2), self.sizes[at]
            leads.append(bits.sum() / sizes.sum())
            if len(at) == 1:
                variances.append(math.inf)
                continue
            without = (bits.sum() - bits) / (sizes.sum() - sizes)
            variances.append((len(at) - 1) * without.var())
            freedoms.append(len(at) - 1)
        lead, variance = float(np.mean(leads)), float(sum(variances))
        if variance in (0.0, math.inf):
            return lead, variance
        freedom = variance**2 / sum(v**2 / n for v, n in zip(variances, freedoms, strict=True))
        return lead, float(stdtrit(freedom, 0.975)) * math.sqrt(variance) / len(leads)

    def _places(self) -> list[tuple[str, np.ndarray]]:
        """The domains by name and where their samples are, int64; samples without bytes are left out."""
        found: dict[str, list[int]] = {}
        for n, domain in enumerate(self.domains):
            if self.sizes[n]:
                found.setdefault(domain, []).append(n)
        return [(domain, np.array(at)) for domain, at in sorted(found.items())]


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
    context = hub.context_of(folder)
    cuts = [(n, w) for n, (domain, r) in enumerate(rendered) for w in windows(domain, r, context)]
    every = list(by_length(cuts, [len(w.ids) for _, w in cuts], batch_tokens))
    batches, nats = cluster.share(every), np.zeros(len(rendered))
    with spread.loaded(model, folder) as loaded:
        for batch in tracking.progress(batches, f"measure {model.name}", len(batches)):
            np.add.at(nats, [n for n, _ in batch], _score(loaded, [w for _, w in batch]))
        if spread.over_ranks(model) and len(batches) * cluster.world() < len(every):  # the others have one more
            _score(loaded, [w for _, w in every[0]])
    del loaded
    if spread.over_ranks(model):
        spread.forget()
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
