"""Capture: one source reads every training sample once; what it expects next is kept."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion import cluster, hub, tracking
from fusion.artifact import Artifact
from fusion.capture.cache import shard_name, shard_rows, write_shard
from fusion.capture.sample import top_k
from fusion.config import Capture, Config, Model
from fusion.corpus import Corpus
from fusion.records import Carries, Rendered, Sample
from fusion.tokens.batch import by_length, pad
from fusion.tokens.render import Renderer


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Read the samples in `inputs["prepare"]` with the source `out.subject`; write a cache, a shard a group of samples.

    Shards that are there already are kept, so a run that was cut off goes on, on any number of ranks.

    Raises:
        ValueError: a model that does not load, a sample longer than its context, or logits that are not finite.
    """
    source = next(m for m in (config.pivot, *config.sources) if m.name == out.subject)
    corpus = Corpus(inputs["prepare"], "train")
    folder = inputs["model"]
    reader = _Reader(source, folder, config.capture)
    missing = cluster.on_main(
        lambda: [n for n in range(corpus.groups) if shard_rows(out.folder / shard_name(n)) is None]
    )
    start = time.monotonic()
    if missing:
        cluster.together(lambda: reader.load())
        mine = cluster.share(missing)

        def read() -> None:
            for n in tracking.progress(mine, f"capture {source.name}", len(mine)):
                write_shard(out.folder / shard_name(n), reader.read(corpus.group(n)))

        cluster.together(read)
    seconds = time.monotonic() - start
    return cluster.on_main(lambda: _facts(out.folder, source, reader.renderer, seconds if missing else 0.0))


class _Reader:
    """A source that turns samples into rows of the cache."""

    def __init__(self, source: Model, folder: Path, settings: Capture):
        self.source, self.folder, self.settings = source, folder, settings
        self.renderer = Renderer(hub.load_tokenizer(source, folder), source.name, hub.template_of(source))
        self.context = hub.context_of(folder)
        self.model: Any = None

    def load(self) -> None:
        """Bring the weights to this rank's device."""
        self.model = hub.load_model(self.source, self.folder).to(cluster.device())
        rows = self.model.get_input_embeddings().weight.shape[0]
        if rows < len(self.renderer.table):
            raise ValueError(
                f"{self.source.name}: its tokenizer has {len(self.renderer.table)} ids and its model {rows}; "
                "they are not a pair"
            )

    def read(self, samples: list[Sample]) -> list[dict[str, Any]]:
        """Rows of the cache, in the order of the samples; too long ones are left out if the config says so."""
        rendered = [(n, self.renderer.render(sample)) for n, sample in enumerate(samples)]
        fits = [(n, r) for n, r in rendered if self._fits(samples[n], r)]
        rows: dict[int, dict[str, Any]] = {}
        for batch in by_length(fits, [len(r.ids) for _, r in fits], self.settings.batch_tokens):
            rows.update(self._forward(samples, batch))
        return [rows[n] for n in sorted(rows)]

    def _fits(self, sample: Sample, rendered: Rendered) -> bool:
        if self.context is None or len(rendered.ids) <= self.context:
            return True
        if self.settings.too_long == "skip":
            return False
        raise ValueError(
            f"{self.source.name}: sample {sample.id} has {len(rendered.ids)} tokens and the context is {self.context}; "
            "lower prepare.max_bytes or set capture.too_long: skip"
        )

    @torch.inference_mode()
    def _forward(
        self, samples: list[Sample], batch: list[tuple[int, Rendered]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        device = cluster.device()
        ids, mask = (torch.from_numpy(array) for array in pad([r.ids for _, r in batch]))
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for row, (n, r) in enumerate(batch):
            at = torch.from_numpy(np.flatnonzero(r.carries))
            try:
                kept = top_k(logits[row, at.to(device)], ids[row, at + 1].to(device), self.settings.k)
            except FloatingPointError as error:
                raise ValueError(
                    f"{self.source.name}: logits are not finite on sample {samples[n].id}, "
                    f"position {int(at[error.args[0]])}; try dtype: float32 for this source"
                ) from None
            yield n, _row(samples[n], r, at.numpy(), kept.ids.cpu(), kept.logp.cpu(), kept.next_logp.cpu())


def _row(
    sample: Sample, r: Rendered, at: np.ndarray, ids: torch.Tensor, logp: torch.Tensor, nxt: torch.Tensor
) -> dict[str, Any]:
    return {
        "id": sample.id,
        "content_bytes": r.content_bytes,
        "tokens": r.ids[at + 1],
        "boundary": r.boundary[at].astype(np.int32),
        "carries": r.carries[at],
        "logp": nxt.numpy(),
        "kept": np.full(len(at), ids.shape[1], dtype=np.uint16),
        "entry_ids": ids.numpy().astype(np.int32).ravel(),
        "entry_logp": logp.numpy().astype(np.float16).ravel(),
    }


def _facts(folder: Path, source: Model, renderer: Renderer, seconds: float) -> dict[str, Any]:
    import pyarrow.parquet as pq

    tokens, size, nats, content_bytes, samples = 0, 0, 0.0, 0, 0
    for path in sorted(folder.glob("shard-*.parquet")):
        table = pq.read_table(path, columns=["content_bytes", "carries", "logp"])
        carries = np.concatenate([np.zeros(0), *table["carries"].to_numpy()])
        logp = np.concatenate([np.zeros(0), *table["logp"].to_numpy()])
        tokens, samples = tokens + len(logp), samples + table.num_rows
        nats -= float(logp[carries == Carries.CONTENT].sum(dtype=np.float64))
        content_bytes += sum(table["content_bytes"].to_pylist())
        size += path.stat().st_size
    return {
        "model": source.model,
        "tokenizer": renderer.table.digest,
        "samples": samples,
        "tokens": tokens,
        "bytes on disk": size,
        "bytes a token": round(size / max(tokens, 1), 2),
        "train bits per byte": round(nats / max(content_bytes, 1) / float(np.log(2)), 4),
        "tokens a second": round(tokens / seconds, 1) if seconds else None,
    }
