"""Bits per byte: the one figure that models of different tokenizers share."""

from collections.abc import Iterable
from dataclasses import replace
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


def made_of(pivot: Model, folder: Path, name: str) -> Model:
    """A model of the pivot's making, to be read with the pivot's settings."""
    return replace(pivot, model=str(folder), name=name, cache=None, parameters=None)


def bits_per_byte(model: Model, folder: Path, samples: Iterable[Sample], batch_tokens: int) -> dict[str, float]:
    """A model's cross-entropy on the samples' segments, by domain, shared out over all ranks.

    The end of a text is not counted, and every text is preceded by the model's start token, so that each byte is.
    Samples longer than the context are read in windows that overlap by half.

    Args:
        folder: where the model is.
        batch_tokens: tokens read at once.

    Returns:
        Domain → bits per byte.

    Raises:
        ValueError: the model or its tokenizer does not load.
    """
    renderer = Renderer(hub.load_tokenizer(model, folder), model.name, hub.template_of(model))
    rendered = [(s.domain, renderer.render(s)) for s in samples]
    loaded = hub.load_model(model, folder).to(cluster.device())
    cuts = [w for domain, r in rendered for w in windows(domain, r, hub.context_of(folder))]
    batches = cluster.share(list(by_length(cuts, [len(w.ids) for w in cuts], batch_tokens)))
    nats: dict[str, float] = {}
    for batch in tracking.progress(batches, f"measure {model.name}", len(batches)):
        for window, score in zip(batch, _score(loaded, batch), strict=True):
            nats[window.domain] = nats.get(window.domain, 0.0) + score
    total: dict[str, float] = {}
    for part in cluster.gather(nats):
        for domain, value in part.items():
            total[domain] = total.get(domain, 0.0) + value
    sizes: dict[str, int] = {}
    for domain, r in rendered:
        sizes[domain] = sizes.get(domain, 0) + r.content_bytes
    return {d: total.get(d, 0.0) / size / float(np.log(2)) for d, size in sorted(sizes.items()) if size}


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
