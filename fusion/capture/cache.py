"""The store of what a source said: parquet, a row a sample, joined by id; docs/cache.md tells what a column means."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.artifact import atomic, read_manifest
from fusion.records import Heard, Sparse

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content_bytes", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("boundary", pa.list_(pa.int32())),
        ("carries", pa.list_(pa.uint8())),
        ("logp", pa.list_(pa.float32())),
        ("kept", pa.list_(pa.uint16())),
        ("entry_ids", pa.list_(pa.int32())),
        ("entry_logp", pa.list_(pa.float16())),
    ]
)
_GROUP = 16  # samples that are decoded together: small, for shuffled reading


def shard_name(n: int) -> str:
    """The file of shard n."""
    return f"shard-{n:06d}.parquet"


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one shard atomically."""
    table = pa.Table.from_pylist(rows, SCHEMA)
    with atomic(path) as part:
        pq.write_table(table, part, compression="zstd", row_group_size=_GROUP)


def shard_rows(path: Path) -> int | None:
    """How many samples a finished shard has; None where there is no readable shard."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


class Cache:
    """A finished cache, read at random by sample id.

    Args:
        folder: a capture stage's folder.
        tokenizer: digest of the byte table that the source must have, None to take any.
        name: the source's name, for errors.

    Raises:
        ValueError: the folder is no finished cache, or another tokenizer's.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None, name: str = "source"):
        self.facts: dict[str, Any] = read_manifest(folder)["facts"]
        if "tokenizer" not in self.facts:
            raise ValueError(f"{name}: {folder} is not a cache; give the folder of a capture stage")
        if tokenizer is not None and self.facts["tokenizer"] != tokenizer:
            made_by = self.facts.get("model", "another model")
            raise ValueError(
                f"{name}: the cache {folder} was made by {made_by}, whose tokenizer is not {name}'s; capture it again"
            )
        self._paths = sorted(folder.glob("shard-*.parquet"))
        self._where: dict[str, tuple[int, int, int]] = {}
        for f, path in enumerate(self._paths):  # opened one at a time: there can be more than a process may hold open
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    for row, id in enumerate(file.read_row_group(group, columns=["id"])["id"].to_pylist()):
                        self._where[id] = (f, group, row)
        self._decoded: OrderedDict[tuple[int, int], list[Heard]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, id: str) -> bool:
        return id in self._where

    def ids(self) -> Iterator[str]:
        """Sample ids in the order of the shards."""
        return iter(self._where)

    def get(self, id: str) -> Heard | None:
        """What the source said of a sample, None where it has not read it."""
        where = self._where.get(id)
        if where is None:
            return None
        group = self._decoded.get(where[:2])
        if group is None:
            with pq.ParquetFile(self._paths[where[0]]) as file:
                group = self._decoded[where[:2]] = _decode(file.read_row_group(where[1]))
            while len(self._decoded) > 64:
                self._decoded.popitem(last=False)
        return group[where[2]]


def _decode(table: pa.Table) -> list[Heard]:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    lists = {
        n: (c.offsets.to_numpy(), c.values.to_numpy(zero_copy_only=False))
        for n, c in columns.items()
        if pa.types.is_list(c.type)
    }

    def cell(name: str, row: int) -> np.ndarray:
        offsets, values = lists[name]
        return values[offsets[row] : offsets[row + 1]]

    heard = []
    for row, content_bytes in enumerate(columns["content_bytes"].to_pylist()):
        offsets = np.concatenate([[0], np.cumsum(cell("kept", row), dtype=np.int64)])
        probs = np.exp(cell("entry_logp", row).astype(np.float32))
        heard.append(
            Heard(
                cell("tokens", row),
                cell("boundary", row).astype(np.int64),
                cell("carries", row),
                cell("logp", row),
                Sparse(offsets, cell("entry_ids", row), probs),
                content_bytes,
            )
        )
    return heard
