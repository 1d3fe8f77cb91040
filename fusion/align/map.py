"""A pair's map as the align stage leaves it: the matrix, and what it needs of both vocabularies, in one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from fusion.align.edit import Words
from fusion.align.paper import Strings
from fusion.align.spelling import Spelling
from fusion.artifact import atomic

_STRINGS = ("source_bare", "target_bare", "source_marked", "target_marked")


@dataclass(frozen=True)
class Map:
    """From a source's vocabulary to a target's.

    Attributes:
        matrix: W (source ids, target ids), rows sum to at most 1.
        first: (target ids, target ids), the share of each token among the target's first tokens where the longest token
            that the text begins with is the row's; an empty row stands for that token itself.
        source: what the source's ids spell.
        target: what the target's ids spell.
        strings: the token strings of both, where a published procedure is to compare them.
    """

    matrix: csr_array
    first: csr_array
    source: Spelling
    target: Spelling
    strings: Strings | None = None

    def __post_init__(self) -> None:
        assert self.matrix.shape == (len(self.source), len(self.target))
        assert self.first.shape == (len(self.target), len(self.target))

    @property
    def rows_mass(self) -> np.ndarray:
        """float64 (source ids + 1,), the share of each id's mass that has a target; the last is that of ids beyond."""
        return np.append(np.asarray(self.matrix.sum(axis=1), dtype=np.float64), 0.0)

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        tensors = {**_packed("matrix", self.matrix), **_packed("first", self.first)}
        for side, spelling in (("source", self.source), ("target", self.target)):
            tensors[f"{side}.bytes"] = spelling.flat
            tensors[f"{side}.offsets"] = spelling.offsets
            tensors[f"{side}.kinds"] = spelling.kinds
        if self.strings is not None:
            words = self.strings.words
            tensors |= {"words.chars": words.chars, "words.offsets": words.offsets, "words.signs": words.signs}
            tensors["words.alphabet"] = np.array([words.alphabet])
            tensors |= {f"words.{name}": getattr(self.strings, name) for name in _STRINGS}
        with atomic(path) as part:
            save_file(tensors, part, {"source": self.source.digest, "target": self.target.digest})

    @staticmethod
    def load(path: Path, source: str | None = None, target: str | None = None) -> "Map":
        """Read a map.

        Args:
            path: a `map.safetensors`.
            source: digest that the source's byte table must have, None to take any.
            target: likewise the target's.

        Raises:
            ValueError: there is no map, it is damaged, or it was made for another pair.
        """
        try:
            with safe_open(path, "np") as file:
                digests = file.metadata() or {}
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            spellings = [
                Spelling(tensors[f"{side}.bytes"], tensors[f"{side}.offsets"], tensors[f"{side}.kinds"], digests[side])
                for side in ("source", "target")
            ]
            for spelling in spellings:
                _check(spelling)
            shapes = (len(spellings[0]), len(spellings[1])), (len(spellings[1]),) * 2
            matrices = [
                _unpacked(name, tensors, shape) for name, shape in zip(("matrix", "first"), shapes, strict=True)
            ]
            strings = _strings(tensors, *shapes[0]) if "words.chars" in tensors else None
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no map; run the align stage first") from None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: is no map of this version ({error}); run the align stage again") from None
        for side, wanted, found in (("source", source, digests["source"]), ("target", target, digests["target"])):
            if wanted is not None and wanted != found:
                raise ValueError(
                    f"{path}: was made for another pair: its {side}'s vocabulary is not this {side}'s; "
                    "run the align stage again"
                )
        return Map(matrices[0], matrices[1], spellings[0], spellings[1], strings)


def _packed(name: str, matrix: csr_array) -> dict[str, np.ndarray]:
    return {
        f"{name}.values": matrix.data.astype(np.float32),
        f"{name}.columns": matrix.indices.astype(np.int32),
        f"{name}.rows": matrix.indptr.astype(np.int64),
        f"{name}.shape": np.array(matrix.shape, dtype=np.int64),
    }


def _unpacked(name: str, tensors: dict[str, Any], shape: tuple[int, int]) -> csr_array:
    values, columns, rows, told = (tensors[f"{name}.{part}"] for part in ("values", "columns", "rows", "shape"))
    if tuple(told.tolist()) != shape:
        raise ValueError(f"{name} is of {told.tolist()} ids and the vocabularies are of {list(shape)}")
    if not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise ValueError(f"{name} holds what is no share")
    matrix = csr_array((values, columns, rows), shape=shape)
    matrix.check_format(full_check=True)
    return matrix


def _strings(tensors: dict[str, Any], source: int, target: int) -> Strings:
    """The token strings; compiled code reads them without looking."""
    chars, offsets, signs = (tensors[f"words.{part}"] for part in ("chars", "offsets", "signs"))
    (alphabet,) = tensors["words.alphabet"].tolist()
    numbers = [tensors[f"words.{name}"] for name in _STRINGS]
    whole = len(offsets) == len(signs) + 1 and offsets[0] == 0 and offsets[-1] == len(chars)
    whole = whole and (np.diff(offsets) >= 0).all() and ((chars >= 0) & (chars < max(alphabet, 1))).all()
    for those, size in zip(numbers, (source, target) * 2, strict=True):
        whole = whole and those.shape == (size,) and ((those >= 0) & (those < len(signs))).all()
    if not whole:
        raise ValueError("its token strings do not fit together")
    return Strings(Words(chars, offsets, signs, alphabet), *numbers)


def _check(spelling: Spelling) -> None:
    """Compiled code reads these without looking: what does not fit together must not get there."""
    offsets = spelling.offsets
    whole = len(offsets) == len(spelling.kinds) + 1 and offsets[0] == 0 and offsets[-1] == len(spelling.flat)
    if not whole or (np.diff(offsets) < 0).any():
        raise ValueError("its vocabularies do not fit together")
