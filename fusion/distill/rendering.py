"""All samples as one model reads them, rendered once by all ranks together and read from files by each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusion import cluster
from fusion.records import Rendered, Sample
from fusion.tokens.render import Renderer

_HEADER = 128  # bytes of a file of numpy that come before its elements
_ARRAYS = ("ids", "boundary", "carries")  # of all samples, one after the other; read as they are needed


def render_all(samples: Sequence[Sample], renderer: Renderer, folder: Path) -> list[Rendered]:
    """Each sample as the renderer has it; every rank takes part, renders its share and reads that of the others.

    Args:
        folder: where all ranks write; what it holds is written over.

    Raises:
        ValueError: a chat that the template refuses, or that is not found in what it renders.
    """
    if cluster.world() == 1:
        return [renderer.render(sample) for sample in samples]
    cluster.together(lambda: _write([renderer.render(sample) for sample in cluster.share(samples)], folder))
    found: list[Rendered | None] = [None] * len(samples)
    for rank in range(cluster.world()):
        found[rank :: cluster.world()] = _read(folder, rank)
    return [rendered for rendered in found if rendered is not None]


def _write(rendered: Sequence[Rendered], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, dtype in zip(_ARRAYS, (np.int32, np.int64, np.uint8), strict=True):
        whole = np.concatenate([np.zeros(0, dtype), *(getattr(r, name) for r in rendered)])
        np.save(folder / f"{name}-{cluster.rank()}.npy", whole.astype(dtype, copy=False))
    facts = [[len(r.ids), r.content_bytes, r.lossy] for r in rendered]
    np.save(folder / f"facts-{cluster.rank()}.npy", np.array(facts, np.int64).reshape(len(facts), 3))


def _read(folder: Path, rank: int) -> list[Rendered]:
    # mapped, so that the ranks of a machine hold it once
    ids, boundary, carries = (_mapped(folder / f"{name}-{rank}.npy") for name in _ARRAYS)
    facts = np.load(folder / f"facts-{rank}.npy")
    starts = np.concatenate([[0], np.cumsum(facts[:, 0])])
    parts = [slice(a, b) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
    return [
        Rendered(ids[part], boundary[part], carries[part], size, bool(lossy))
        for part, (size, lossy) in zip(parts, facts[:, 1:].tolist(), strict=True)
    ]


def _mapped(path: Path) -> np.ndarray:
    """An array as it lies on disk; an empty one cannot be mapped."""
    held = np.load(path, mmap_mode="c") if path.stat().st_size > _HEADER else np.load(path)
    return held.view(np.ndarray)
