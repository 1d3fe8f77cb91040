"""The store of what a source said: parquet, a row a sample, joined by id; docs/cache.md tells what each byte means."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.artifact import atomic, damage, read_manifest
from fusion.capture.coder import COLUMNS, PLAIN, Coder
from fusion.records import Heard

FORMAT = 3
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("left_out", pa.string()),
        ("content_bytes", pa.int32()),
        ("positions", pa.int32()),
        *((name, pa.binary()) for name in COLUMNS),
    ]
)
_UNUSED = {  # columns that are empty with a sampler, and cost time to read all the same
    "random": {"left", "head", "head_logp"},
    "hybrid": set(),
    "top_k": {"drawn", "counts", "drawn_logp"},
    "nucleus": {"drawn", "counts", "drawn_logp"},
}
_COMPRESSED = set(COLUMNS) - set(PLAIN)
_GROUP = 4096  # positions that are read together: few, for shuffled reading
_OPEN = 64  # files and groups that are kept at hand
VOCABULARY, INDEX = "vocabulary.parquet", "index.parquet"


def shard_name(n: int) -> str:
    """The file of shard n."""
    return f"shard-{n:06d}.parquet"


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write one shard atomically.

    Args:
        rows: in the order of the samples; one that was left out has an `id` and a reason in `left_out`, and no more.
        about: what made it, kept as JSON among the file's metadata.
    """
    empty = dict.fromkeys(COLUMNS, b"")
    schema = SCHEMA.with_metadata({"fusion": json.dumps({"format": FORMAT, **about}, sort_keys=True)})
    with atomic(path) as part, _writer(part, schema) as writer:
        for group in _groups(rows):
            whole = [{"left_out": None, "content_bytes": 0, "positions": 0, **empty, **row} for row in group]
            writer.write_table(pa.Table.from_pylist(whole, schema))


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression={name: "zstd" if name in _COMPRESSED else "none" for name in schema.names},
        compression_level={name: 1 for name in schema.names if name in _COMPRESSED},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def _groups(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    filled = 0
    for row in rows:
        group.append(row)
        filled += row.get("positions", 0)
        if filled >= _GROUP:
            yield group
            group, filled = [], 0
    if group:
        yield group


def write_vocabulary(path: Path, order: np.ndarray) -> None:
    """Write token ids in the order of their ranks."""
    with atomic(path) as part:
        pq.write_table(pa.table({"id": pa.array(order, pa.int32())}), part, compression="zstd")


def read_vocabulary(path: Path) -> np.ndarray:
    """int32, token ids in the order of their ranks.

    Raises:
        ValueError: it is missing or damaged.
    """
    with _opened(path) as file:
        order: np.ndarray = _read(path, file, 0)["id"].to_numpy()
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"{path}: is damaged (ids are missing or stand twice); start again with --repair")
    return order


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write where each sample stands, so that a cache of millions opens without a look at its shards."""
    schema = pa.schema([("id", pa.string()), ("left_out", pa.string()), *((n, pa.int32()) for n in _PLACE)])
    waiting: list[pa.Table] = []
    with atomic(folder / INDEX) as part, _writer(part, schema) as writer:
        for shard, name in enumerate(names):
            with _opened(folder / name) as file:
                for group in range(file.num_row_groups):
                    part_of = _read(folder / name, file, group, ["id", "left_out"])
                    rows = np.arange(part_of.num_rows)
                    where = [np.full(len(rows), shard), np.full(len(rows), group), rows]
                    columns = [*part_of.columns, *(pa.array(w, pa.int32()) for w in where)]
                    waiting.append(pa.table(columns, schema))
            if sum(len(table) for table in waiting) >= _INDEXED:  # many rows a group: a reader takes time for each
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())


_PLACE = ("shard", "group", "row")
_INDEXED = 1 << 16


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; start again with --repair") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _read(path: Path, file: pq.ParquetFile, group: int, columns: list[str] | None = None) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)  # threads cost more than they save
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: is damaged ({' '.join(str(error).split())[:90]}); start again with --repair")


def shard_facts(path: Path) -> dict[str, Any]:
    """What made a shard, and how many rows it has.

    Raises:
        ValueError: it is missing, damaged or no shard.
    """
    with _opened(path) as file:
        told = (file.schema_arrow.metadata or {}).get(b"fusion")
        if told is None:
            raise ValueError(f"{path}: is no shard of a cache")
        return {**json.loads(told), "rows": file.metadata.num_rows}


def intact(path: Path) -> bool:
    """Whether a file is a shard whose every page has its checksum."""
    try:
        if not shard_facts(path)["rows"]:
            return False
        with _opened(path) as file:
            for group in range(file.num_row_groups):
                _read(path, file, group)
    except (ValueError, KeyError):
        return False
    return True


class Cache:
    """A finished cache, read at random by sample id.

    Args:
        folder: a capture stage's folder.
        tokenizer: digest of the byte table that the source must have, None to take any.
        name: the source's name, for errors.

    Raises:
        ValueError: the folder is no finished cache, or another tokenizer's, or a file is missing or cut short. What is
            read later is checked against its checksum then.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None, name: str = "source"):
        manifest = read_manifest(folder)
        self.facts: dict[str, Any] = manifest["facts"]
        if not {"tokenizer", "shards"} <= self.facts.keys():
            raise ValueError(f"{name}: {folder} is not a cache; give the folder of a capture stage")
        if self.facts.get("cache format") != FORMAT or not {"sampler", "temperature", "config"} <= self.facts.keys():
            raise ValueError(f"{name}: the cache {folder} has another format than {FORMAT}; capture it again")
        if tokenizer is not None and self.facts["tokenizer"] != tokenizer:
            made_by = self.facts.get("model", "another model")
            raise ValueError(
                f"{name}: the cache {folder} was made by {made_by}, whose tokenizer is not {name}'s; capture it again"
            )
        for file, told in manifest["files"].items():
            if not (folder / file).exists():
                raise ValueError(f"{name}: {folder / file} is missing; start again with --repair")
            if (folder / file).stat().st_size != told["bytes"]:
                raise ValueError(f"{name}: {folder / file} is cut short or changed; start again with --repair")
        own = {file: manifest["files"][file] for file in (VOCABULARY, INDEX) if file in manifest["files"]}
        for file, how in damage(folder, own).items():
            raise ValueError(f"{name}: {folder / file} {how}; start again with --repair")
        self._folder = folder
        self._coder = Coder(read_vocabulary(folder / VOCABULARY), self.facts["temperature"])
        with _opened(folder / INDEX) as file:
            index = pa.concat_tables(
                [_read(folder / INDEX, file, n) for n in range(file.num_row_groups)]
                or [file.schema_arrow.empty_table()]
            )
        chunks = index["id"].chunks  # a batch at a time: as Python's strings ids take ten times the room
        self._ids = np.array([int(id.as_py(), 16) for chunk in chunks for id in chunk], dtype=np.uint64)
        self._order = np.argsort(self._ids, kind="stable")
        self._sorted = self._ids[self._order]
        self._where = np.stack([index[name].to_numpy() for name in _PLACE], axis=1)
        reasons = index["left_out"].to_pylist()
        self.left_out = {f"{int(self._ids[n]):016x}": why for n, why in enumerate(reasons) if why is not None}
        unused = _UNUSED[self.facts["sampler"]] | ({"drawn_logp"} if self.facts["temperature"] == 1 else set())
        self._columns = ["content_bytes", *(name for name in COLUMNS if name not in unused)]
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids) - len(self.left_out)

    def __contains__(self, id: str) -> bool:
        return id not in self.left_out and self._find(id) is not None

    def ids(self) -> Iterator[str]:
        """Sample ids in the order of the shards."""
        return (id for n in self._ids if (id := f"{int(n):016x}") not in self.left_out)

    def get(self, id: str) -> Heard | None:
        """What the source said of a sample, None where it has not read it.

        Raises:
            ValueError: the file that holds it is damaged.
        """
        place = None if id in self.left_out else self._find(id)
        if place is None:
            return None
        shard, group, row = place
        cells = self._group(shard, group).row(row)
        try:
            return self._coder.decode(cells)
        except (IndexError, ValueError) as error:  # streams that do not fit each other: numpy's errors, and code's
            raise _damaged(self._folder / shard_name(shard), error) from None

    def _find(self, id: str) -> tuple[int, int, int] | None:
        number = np.uint64(int(id, 16))
        n = int(np.searchsorted(self._sorted, number))
        if n == len(self._sorted) or self._sorted[n] != number:
            return None
        shard, group, row = self._where[self._order[n]]
        return int(shard), int(group), int(row)

    def _group(self, shard: int, group: int) -> "_Group":
        found = self._groups.pop((shard, group), None)
        if found is None:
            path = self._folder / shard_name(shard)
            file = self._files.pop(shard, None) or _opened(path)
            self._files[shard] = file
            try:
                found = _Group(_read(path, file, group, self._columns))
            except KeyError as error:  # a column's name in the footer, which has no checksum
                raise _damaged(path, error) from None
        self._groups[shard, group] = found
        while len(self._groups) > _OPEN:
            self._groups.popitem(last=False)
        while len(self._files) > _OPEN:
            self._files.popitem(last=False)[1].close()
        return found


class _Group:
    """Some rows of a shard, as their bytes."""

    def __init__(self, table: pa.Table):
        self._sizes = table.column("content_bytes")
        self._cells = [(name, table.column(name)) for name in table.column_names if name != "content_bytes"]

    def row(self, n: int) -> dict[str, Any]:
        cells = {name: np.frombuffer(column[n].as_buffer(), np.uint8) for name, column in self._cells}
        return {**_NO_BYTES, "content_bytes": self._sizes[n].as_py(), **cells}


_NO_BYTES = dict.fromkeys(COLUMNS, np.zeros(0, np.uint8))
