"""Samples on disk: parquet, read group by group, so that no stage holds the corpus."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusion.artifact import atomic
from fusion.records import Sample

_LARGEST_GROUP = 256  # samples a rank claims at a time


def group_size(count: int) -> int:
    """Samples of a row group, of so many in all: 256, or less where that gives fewer than some 32 groups."""
    return max(8, min(_LARGEST_GROUP, count // 32))


def write_samples(path: Path, samples: Iterable[Sample], size: int | None = None) -> None:
    """Write samples in row groups of `size`, else of `group_size` of them all, which memory holds then."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("complete", pa.bool_()),
            ("text", pa.string()),
            ("messages", pa.string()),
        ]
    )
    if size is None:
        samples = list(samples)
        size = group_size(len(samples))
    rows = (_to_row(sample) for sample in samples)
    with atomic(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, size)):
            writer.write_table(pa.Table.from_pylist(group, schema))


class Corpus:
    """The samples of one part (`train`, `validation` or `heldout`) of a prepared folder."""

    def __init__(self, folder: Path, part: str):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(folder / f"{part}.parquet")

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self._file.num_row_groups)

    @property
    def chats(self) -> bool:
        """Whether any of its samples is a chat."""
        whole = self._file.metadata
        column = whole.schema.names.index("messages")
        groups = [whole.row_group(n) for n in range(self.groups)]
        return any(group.column(column).statistics.null_count < group.num_rows for group in groups)

    def group(self, n: int) -> list[Sample]:
        """The samples of group n."""
        return [_from_row(row) for row in self._file.read_row_group(n).to_pylist()]

    def ids(self) -> Iterator[str]:
        """The ids of all samples, in their order."""
        for n in range(self.groups):
            yield from self._file.read_row_group(n, columns=["id"])["id"].to_pylist()

    def __iter__(self) -> Iterator[Sample]:
        for n in range(self.groups):
            yield from self.group(n)


def _to_row(sample: Sample) -> dict:
    row = sample.to_row()
    messages = row.get("messages")
    return {**row, "text": row.get("text"), "messages": json.dumps(messages) if messages else None}


def _from_row(row: dict) -> Sample:
    messages = json.loads(row["messages"]) if row["messages"] else None
    return Sample.from_row({**row, "messages": messages})
