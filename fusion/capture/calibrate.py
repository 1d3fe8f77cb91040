"""A short trial of a source on this device: how fast it reads, how many tokens text has, how much room they take."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fusion.capture.cache import shard_name, write_shard
from fusion.capture.coder import Coder
from fusion.capture.reader import Reader
from fusion.config import Capture, Model
from fusion.records import Sample, sample_id

_PROBE = 256  # characters of a text that are read first: a slow device shall not begin with a whole one
_PARTS = 4  # of the time, for a chunk of samples


@dataclass(frozen=True, slots=True)
class Trial:
    """What a source made of some samples.

    Attributes:
        text: bytes of the segments it read.
        tokens: positions that carry loss: those that the cache keeps.
        disk: bytes of their shard.
        rate: tokens a second, rendered, read, drawn from, encoded and written, by one process on its device.
        left_out: share of the samples that were left out.
    """

    text: int
    tokens: int
    disk: int
    rate: float
    left_out: float


def trial(source: Model, folder: Path, settings: Capture, samples: Sequence[Sample], seconds: float) -> Trial | None:
    """Load a source, let it read as many samples as it can in `seconds`; None where it had to leave out all of them.

    What is written is removed again. It is one process's work: not for a source that is spread over all ranks.

    Raises:
        ValueError: the model does not load, a sample is longer than its context, or logits are not finite.
        MemoryError: the device has too little memory.
    """
    reader = Reader(source, folder, settings)
    try:
        reader.load()
        return _tried(reader, samples, seconds)
    except torch.OutOfMemoryError as error:
        raise MemoryError(" ".join(str(error).split())[:120]) from None
    finally:
        reader.close()


def _tried(reader: Reader, samples: Sequence[Sample], seconds: float) -> Trial | None:
    unranked = Coder(np.arange(reader.width, dtype=np.int32), reader.temperature)
    first, probe = _Chunk(reader, unranked), _Chunk(reader, unranked)
    first.read([_beginning(samples[0])])  # pays for what is done once: compiling, the device's start
    probe.read([_beginning(samples[0])])
    most = reader.settings.batch_tokens
    per_byte = probe.tokens / max(probe.text, 1) or 0.25
    rate = max(probe.tokens, 1) / probe.seconds
    waiting, end = iter(samples), time.monotonic() + seconds
    chunks: list[_Chunk] = []
    coder: Coder | None = None
    while (left := end - time.monotonic()) > 0:
        some = list(_up_to(waiting, min(most, rate * min(left, seconds / _PARTS)) / per_byte))
        if not some:
            break
        if coder is None:
            few = some[: max(1, len(some) // _PARTS)]
            ranks = np.argsort(-reader.frequencies(reader.batches(few, {})), kind="stable")
            coder = Coder(ranks.astype(np.int32), reader.temperature)
        chunk = _Chunk(reader, coder)
        chunk.read(some)
        chunks.append(chunk)
        rate = max(chunk.tokens, 1) / chunk.seconds
    tokens, offered = sum(c.tokens for c in chunks), sum(c.offered for c in chunks)
    if not tokens:
        return None
    rows = [row for chunk in chunks for row in chunk.rows]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusion-plan-") as scratch:
        path = Path(scratch) / shard_name(0)
        write_shard(path, rows, {})
        disk = path.stat().st_size
    written = (time.monotonic() - begun) / tokens
    largest = max(c.tokens for c in chunks)
    full = [c for c in chunks if 2 * c.tokens >= largest]  # small ones keep a device waiting as a capture does not
    read = sum(c.seconds for c in full) / sum(c.tokens for c in full)
    text = sum(c.text for c in chunks)
    return Trial(text, tokens, disk, 1 / (read + written), 1 - len(rows) / offered)


class _Chunk:
    """Some samples, read and encoded at once."""

    def __init__(self, reader: Reader, coder: Coder):
        self._reader, self._coder = reader, coder
        self.rows: list[dict] = []
        self.text = self.tokens = self.offered = 0
        self.seconds = 0.0

    def read(self, samples: Sequence[Sample]) -> None:
        """Read the samples and take the time."""
        sizes = {s.id: sum(s.sizes()) for s in samples}
        begun = time.monotonic()
        for batch in self._reader.batches(samples, {}):
            for said in self._reader.read(batch)[0]:
                self.rows.append(self._coder.encode(said))
                self.tokens += len(said.heard.ids)
                self.text += sizes[said.id]
        self.seconds = max(time.monotonic() - begun, 1e-6)
        self.offered = len(samples)


def _up_to(samples: Iterator[Sample], size: float) -> Iterator[Sample]:
    """The next samples, as many as come to `size` bytes: at least one."""
    taken = 0
    for sample in samples:
        yield sample
        taken += sum(sample.sizes())
        if taken >= size:
            return


def _beginning(sample: Sample) -> Sample:
    if sample.text is None:
        return sample
    text = sample.text[:_PROBE]
    return Sample(sample_id(text), sample.domain, text, (), False)
