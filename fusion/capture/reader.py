"""A source that turns samples into what the cache keeps of them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fusion import cluster, hub, spread
from fusion.capture import sample as samplers
from fusion.capture.coder import Said
from fusion.capture.head import Halves
from fusion.capture.sample import Kept
from fusion.config import Capture, Model
from fusion.records import Heard, Rendered, Sample, Sparse
from fusion.tokens.batch import by_length, pad
from fusion.tokens.bytes import Kind
from fusion.tokens.render import Renderer

_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}  # logits that exist at a time
_DRAWING = ("random", "hybrid")
TOO_LONG, NOT_FINITE = "longer than the context", "logits not finite"


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are read at once, with their numbers among those of a shard."""

    numbers: list[int]
    samples: list[Sample]
    rendered: list[Rendered]


class Reader:
    """A source, its weights loaded when they are first needed.

    Args:
        source: the config's entry.
        folder: where it is.
        settings: the config's section.
    """

    def __init__(self, source: Model, folder: Path, settings: Capture):
        self.source, self.folder, self.settings = source, folder, settings
        self.renderer = Renderer(hub.load_tokenizer(source, folder), source.name, hub.template_of(source))
        self.context = hub.context_of(folder)
        self._held = ExitStack()
        self._halves: Halves | None = None
        self._rows = len(self.renderer.table)  # that the model embeds
        self.width = 0

    @property
    def spread(self) -> bool:
        """True where all ranks hold the weights together, and so must read in step."""
        return spread.over_ranks(self.source)

    @property
    def temperature(self) -> float:
        """Of the proposal; 1 where nothing is drawn."""
        return self.settings.temperature if self.settings.sampler in _DRAWING else 1.0

    def load(self) -> None:
        """Bring the weights to this rank's device.

        Raises:
            ValueError: they do not load, or are not this tokenizer's.
        """
        model = self._held.enter_context(spread.loaded(self.source, self.folder))
        table = model.get_input_embeddings().weight
        rows = getattr(table, "ds_shape", table.shape)[0]
        # control tokens beyond, which no text has, are a pair still: Gemma 3's image token, without an image part
        wanted = np.isin(self.renderer.table.kinds, (Kind.TEXT, Kind.BYTE))
        wanted[[i for i in (self.renderer.start_id, self.renderer.end_id) if i is not None]] = True
        if wanted[rows:].any():
            raise ValueError(
                f"{self.source.name}: its tokenizer has {len(self.renderer.table)} ids and its model {rows}; "
                "they are not a pair"
            )
        self._rows, self._halves = rows, Halves(model)
        self.width = self._halves.width

    def close(self) -> None:
        """Let go of the weights."""
        self._halves = None
        self._held.close()
        spread.forget()

    def batches(self, samples: Sequence[Sample], left_out: dict[int, str]) -> Iterator[Batch]:
        """The samples in batches of like length; those that are too long are written down in `left_out`.

        Raises:
            ValueError: a sample is longer than the context and the config does not say `too_long: skip`.
        """
        rendered = [self.renderer.render(sample) for sample in samples]
        fits = []
        for n, r in enumerate(rendered):
            if len(r.ids) and (highest := int(r.ids.max())) >= self._rows:
                raise ValueError(
                    f"{self.source.name}: sample {samples[n].id} has id {highest} and the model {self._rows} ids; "
                    "they are not a pair"
                )
            if self.context is None or len(r.ids) <= self.context:
                fits.append(n)
            elif self.settings.too_long == "skip":
                left_out[n] = TOO_LONG
            else:
                raise ValueError(
                    f"{self.source.name}: sample {samples[n].id} has {len(r.ids)} tokens and the context is "
                    f"{self.context}; lower prepare.max_bytes or set capture.too_long: skip"
                )
        for numbers in by_length(fits, [len(rendered[n].ids) for n in fits], self.settings.batch_tokens):
            yield Batch(numbers, [samples[n] for n in numbers], [rendered[n] for n in numbers])

    def read(self, batch: Batch | None) -> tuple[list[Said], dict[str, str]]:
        """What the source says of a batch, and which samples of it are left out, by id, and why.

        Args:
            batch: None to take part in what the other ranks read.

        Raises:
            ValueError: logits are not finite and the config does not say `on_nonfinite: skip`; or the device has too
                little memory.
        """
        try:
            return self._read(batch)
        except torch.OutOfMemoryError as error:
            why = f"{self.source.name}: the device has too little memory ({' '.join(str(error).split())[:80]}); lower "
            if self.spread:
                raise cluster.Stranded(f"{why}capture.batch_tokens") from None
            raise ValueError(f"{why}capture.batch_tokens, or set `parallel: zero3` for this source") from None

    @torch.inference_mode()
    def _read(self, batch: Batch | None) -> tuple[list[Said], dict[str, str]]:
        rendered = batch.rendered if batch else [_NOTHING]
        at = [np.flatnonzero(r.carries) for r in rendered]
        following = torch.from_numpy(np.concatenate([r.ids[a + 1] for r, a in zip(rendered, at, strict=True)]))
        bad = np.zeros(len(following), dtype=bool)
        uniform = None
        if self.settings.sampler in _DRAWING:
            ids = [s.id for s in batch.samples] if batch else [""]
            drawn = [samplers.uniforms(id, a, self.settings.draws) for id, a in zip(ids, at, strict=True)]
            uniform = torch.from_numpy(np.concatenate(drawn)).to(cluster.device())
        following = following.long().to(cluster.device())

        def take(rows: slice, logits: torch.Tensor) -> Kept:
            draws = None if uniform is None else uniform[rows]
            while True:
                try:
                    return _keep(self.settings, logits, following[rows], draws)
                except FloatingPointError:
                    broken = ~torch.isfinite(logits.float().logsumexp(-1))
                    bad[rows] |= broken.cpu().numpy()
                    logits = logits.masked_fill(broken[:, None], 0)

        parts = [take(rows, logits) for rows, logits in self._blocks(rendered, at)]
        # samples of which nothing carries loss have no block
        kept = samplers.joined(parts or [take(slice(0, 0), torch.zeros((0, self.width), device=following.device))])
        if batch is None:
            return [], {}
        return self._told(batch, at, following, kept, bad)

    def frequencies(self, batches: Iterable[Batch]) -> np.ndarray:
        """float64 (V,), the mean probability of each id over all positions that carry loss."""
        sums = torch.zeros(self.width, dtype=torch.float64, device=cluster.device())
        with torch.inference_mode():
            for batch in batches:
                at = [np.flatnonzero(r.carries) for r in batch.rendered]
                for _, logits in self._blocks(batch.rendered, at):
                    sums += logits.float().softmax(-1).nan_to_num(0).sum(0, dtype=torch.float64)
        return sums.cpu().numpy()

    def _blocks(self, rendered: Sequence[Rendered], at: Sequence[np.ndarray]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits at some positions of each sample, a block of rows at a time, as many on every rank if they must."""
        assert self._halves is not None
        device = cluster.device()
        ids, mask = (torch.from_numpy(array).to(device) for array in pad([r.ids for r in rendered]))
        rows = np.concatenate([n * ids.shape[1] + a for n, a in enumerate(at)])
        wanted = torch.from_numpy(rows).to(device)
        # a head that lies spread over ranks is gathered for each block: few large ones
        size = max(_BLOCK[device.type] * (8 if self.spread else 1) // self.width, 1)
        if not self._halves.split:
            readings = len(rendered)
            if self.spread:
                (readings,) = cluster.most([readings])
            for start in range(readings):  # one sample's logits at a time
                if start >= len(rendered):  # here all are read; another rank has more to ask
                    self._halves.all_logits(ids[:1], mask[:1])
                    continue
                logits = self._halves.all_logits(ids[start : start + 1], mask[start : start + 1])[0]
                first = sum(len(a) for a in at[:start])
                for begin in range(0, len(at[start]), size):
                    part = at[start][begin : begin + size]
                    yield (
                        slice(first + begin, first + begin + len(part)),
                        logits[torch.from_numpy(part).to(device)],
                    )
            return
        hidden = self._halves.hidden(ids, mask)
        hidden = hidden.reshape(-1, hidden.shape[-1])[wanted]
        blocks = max(-(-len(rows) // size), 1)
        if self.spread:
            (blocks,) = cluster.most([blocks])
        for n in range(blocks):
            part_of = hidden[n * size : (n + 1) * size]
            beyond = not len(part_of)  # here all is said; another rank has more to ask
            logits = self._halves.logits(hidden[:1] if beyond else part_of)
            if not beyond:
                yield slice(n * size, n * size + len(part_of)), logits

    def _told(
        self, batch: Batch, at: Sequence[np.ndarray], following: torch.Tensor, kept: Kept, bad: np.ndarray
    ) -> tuple[list[Said], dict[str, str]]:
        next_logp, *columns = columns_of(kept, following)
        said, left_out, start = [], {}, 0
        for sample, r, a in zip(batch.samples, batch.rendered, at, strict=True):
            part = slice(start, start + len(a))
            start += len(a)
            if bad[part].any():
                if self.settings.on_nonfinite == "stop":
                    raise ValueError(
                        f"{self.source.name}: logits are not finite on sample {sample.id}, position "
                        f"{int(a[bad[part]][0])}; try dtype: float32 for this source, or capture.on_nonfinite: skip"
                    )
                left_out[sample.id] = NOT_FINITE
                continue
            heard = Heard(r.ids[a + 1], r.boundary[a], r.carries[a], next_logp[part], NO_ENTRIES, r.content_bytes)
            said.append(Said(sample.id, heard, *(column[part] for column in columns)))
        return said, left_out


def columns_of(kept: Kept, following: torch.Tensor) -> tuple[np.ndarray, ...]:
    """What is kept of T positions as `Said` has it: log-probabilities of what followed, `left`, and so on."""
    known = (kept.ids == following[:, None]).any(-1)
    left = (kept.left() - torch.where(known, 0.0, kept.next_logp.exp())).clamp(min=0)
    held = (kept.next_logp, left, kept.ids, kept.logp, kept.drawn, kept.counts, kept.drawn_logp)
    return tuple(column.cpu().numpy() for column in held)


NO_ENTRIES = Sparse(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
_NOTHING = Rendered(np.zeros(2, np.int32), np.zeros(2, np.int64), np.array([1, 0], np.uint8), 0)


def _keep(how: Capture, logits: torch.Tensor, following: torch.Tensor, uniform: torch.Tensor | None) -> Kept:
    if how.sampler == "top_k":
        return samplers.top_k(logits, following, how.k)
    if how.sampler == "nucleus":
        return samplers.nucleus(logits, following, how.mass, how.k)
    assert uniform is not None
    if how.sampler == "random":
        return samplers.random(logits, following, uniform, how.temperature)
    return samplers.hybrid(logits, following, how.head, uniform, how.temperature)
