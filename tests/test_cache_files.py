"""A cache's files: what was written comes back, any parquet reader opens it, and damage is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from said import order_of, sampled, through
from tiny import artifact

from fusion.artifact import MANIFEST, Artifact
from fusion.capture.cache import (
    FORMAT,
    INDEX,
    VOCABULARY,
    Cache,
    read_vocabulary,
    shard_facts,
    shard_name,
    write_index,
    write_shard,
    write_vocabulary,
)
from fusion.capture.coder import COLUMNS, Coder, Said
from fusion.records import Heard, Sparse

V = 500
FACTS = {"tokenizer": "t", "model": "m", "cache format": FORMAT, "sampler": "hybrid", "temperature": 1.3, "config": "c"}
LEFT_OUT = f"{2**63:016x}"
CODER = Coder(order_of(V), 1.3)


def stored(folder: Artifact, shards: list[list[Said | dict[str, Any]]], **facts: Any) -> Path:
    """A finished cache with these rows."""
    write_vocabulary(folder.folder / VOCABULARY, CODER.order)
    for n, rows in enumerate(shards):
        coded = [row if isinstance(row, dict) else CODER.encode(row) for row in rows]
        write_shard(folder.folder / shard_name(n), coded, {"key": folder.key, "shard": n})
    write_index(folder.folder, [shard_name(n) for n in range(len(shards))])
    folder.publish({**FACTS, "shards": len(shards), **facts}, 0.0)
    return folder.folder


def one(id: str, n: int = 7) -> Said:
    return sampled("hybrid" if n else "random", V, n, 1.3, int(id, 16) % 1000, 30, id)[0]


IDS = [f"{int(n):016x}" for n in np.random.default_rng(1).integers(0, 2**63, 6)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples, one of them left out."""
    rows: list[Said | dict[str, Any]] = [one(id) for id in IDS]
    rows.insert(4, {"id": LEFT_OUT, "left_out": "longer than the context"})
    return stored(artifact(tmp_path_factory.mktemp("whole"), "capture", "a"), [rows[:3], rows[3:]])


def equal(found: Heard | None, wanted: Heard | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    pairs = [(getattr(found, n), getattr(wanted, n)) for n in ("ids", "boundary", "carries", "logp")]
    pairs += [(getattr(found.entries, n), getattr(wanted.entries, n)) for n in ("offsets", "ids", "probs")]
    return all(np.array_equal(a, b) for a, b in pairs) and found.content_bytes == wanted.content_bytes


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_that_do_not_fit_each_other_are_refused(column: str) -> None:
    """A writer's fault that every checksum agrees with: compiled code must not read beyond an array."""
    row = CODER.encode(one(IDS[0], 60))
    for cut in (row[column][: len(row[column]) // 2], row[column][:-1], row[column] * 2):
        cells = {name: np.frombuffer(row[name], np.uint8) for name in COLUMNS} | {column: np.frombuffer(cut, np.uint8)}
        if cut == row[column] or column in ("bits", "id_bits") and len(cut) > len(row[column]):
            continue  # nothing was cut; bits that nobody asks do no harm
        with pytest.raises((IndexError, ValueError)):
            CODER.decode({"content_bytes": 1, **cells})


def test_an_index_of_many_shards_has_few_groups(tmp_path: Path) -> None:
    out = artifact(tmp_path, "capture", "a")
    ids = [f"{n:016x}" for n in range(300)]
    stored(out, [[{"id": id, "left_out": "why"} for id in ids[n : n + 3]] for n in range(0, 300, 3)])
    assert pq.read_metadata(out.folder / INDEX).num_row_groups == 1
    assert list(Cache(out.folder).left_out) == ids


def test_what_was_written_is_read_in_any_order(whole: Path) -> None:
    cache = Cache(whole, "t", "a")
    assert list(cache.ids()) == IDS and len(cache) == 6
    wanted = {id: through(CODER, one(id)) for id in IDS}
    for id in (*reversed(IDS), IDS[2], IDS[2], IDS[5]):
        assert id in cache and equal(cache.get(id), wanted[id])
    assert cache.get("0" * 16) is None and "0" * 16 not in cache and cache.get("f" * 16) is None
    assert shard_facts(whole / shard_name(1)) == {
        "format": FORMAT, "key": json.loads((whole / MANIFEST).read_text())["key"], "shard": 1, "rows": 4,
    }  # fmt: skip


def test_a_sample_that_was_left_out_says_why(whole: Path) -> None:
    cache = Cache(whole)
    assert cache.left_out == {LEFT_OUT: "longer than the context"}
    assert cache.get(LEFT_OUT) is None and LEFT_OUT not in cache and LEFT_OUT not in list(cache.ids())
    row = pq.read_table(whole / shard_name(1)).to_pylist()[1]
    assert row["id"] == LEFT_OUT and row["positions"] == 0 and row["tokens"] == b""


def test_many_shards_and_groups(tmp_path: Path) -> None:
    """More shards than are kept open, samples of no position, and groups that a shard is cut into."""
    empty = one("0", 0)
    shards: list[list[Said | dict[str, Any]]] = [[one(f"{n + 1:016x}", n % 4)] for n in range(70)]
    large = [one(f"{n:016x}", 1500) for n in range(100, 107)]  # 4096 positions a group: 3, 3, 1
    folder = stored(artifact(tmp_path, "capture", "a"), [*shards, [*large], [empty], []])
    assert pq.ParquetFile(folder / shard_name(70)).num_row_groups == 3
    cache = Cache(folder)
    assert len(cache) == 78
    for said in [*(row for rows in reversed(shards) for row in rows), *large, empty, *shards[0], *shards[69]]:
        assert isinstance(said, Said) and equal(cache.get(said.id), through(CODER, said))
    heard = cache.get("0" * 16)
    assert heard is not None and len(heard.ids) == len(heard.entries) == 0 and heard.bits_per_byte() == float("inf")


def test_a_cache_of_nothing(tmp_path: Path) -> None:
    cache = Cache(stored(artifact(tmp_path, "capture", "a"), []))
    assert len(cache) == 0 and list(cache.ids()) == [] and cache.left_out == {} and cache.get("0" * 16) is None


def test_ranks_come_back(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / VOCABULARY, order_of(300_000))
    assert np.array_equal(read_vocabulary(tmp_path / VOCABULARY), order_of(300_000))
    for wrong in (np.array([0, 1, 1]), np.array([1, 2, 3]), np.array([-1, 0, 1])):
        write_vocabulary(tmp_path / VOCABULARY, wrong.astype(np.int32))
        with pytest.raises(ValueError, match="is damaged .ids are missing or stand twice.; start again with --repair"):
            read_vocabulary(tmp_path / VOCABULARY)


def test_other_readers_open_it(whole: Path, tmp_path: Path) -> None:
    import datasets

    frame = pandas.read_parquet(whole / shard_name(1))
    assert frame["id"].tolist() == [IDS[3], LEFT_OUT, *IDS[4:]] and frame["positions"].tolist() == [7, 0, 7, 7]
    datasets.disable_progress_bars()
    files = sorted(str(path) for path in whole.glob("shard-*.parquet"))
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert loaded["id"] == [*IDS[:4], LEFT_OUT, *IDS[4:]] and loaded["left_out"][4] == "longer than the context"
    coded = CODER.encode(one(IDS[5]))
    for name, value in coded.items():
        assert loaded[6][name] == frame[name][3] == value
    index = pandas.read_parquet(whole / INDEX)
    assert index["shard"].tolist() == [0, 0, 0, 1, 1, 1, 1] and index["row"].tolist() == [0, 1, 2, 0, 1, 2, 3]


# Damage. A shard's pages have checksums; its footer and the pages' headers have none.


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def footer_of(path: Path) -> int:
    """Where a parquet file's footer begins."""
    raw = path.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")


def read(folder: Path) -> list[Heard | None]:
    cache = Cache(folder)
    return [cache.get(id) for id in (*IDS, LEFT_OUT)]


def flips(path: Path, start: int, end: int, step: int, look: Callable[[int], None]) -> None:
    """Call `look` with every step-th byte changed, each in another bit."""
    whole = path.read_bytes()
    for n, at in enumerate(range(start, end, step)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << n % 8]) + whole[at + 1 :])
        look(at)
    path.write_bytes(whole)


@pytest.mark.parametrize("name", [shard_name(0), shard_name(1)])
def test_a_flipped_bit_never_gives_other_numbers(copy: Path, name: str) -> None:
    wanted, refused = read(copy), []

    def look(at: int) -> None:
        try:
            found = read(copy)
        except ValueError:
            refused.append(at)
        else:  # what does not matter may be otherwise
            assert all(equal(a, b) for a, b in zip(found, wanted, strict=True)), at

    flips(copy / name, 0, (copy / name).stat().st_size, 31, look)
    assert len(refused) > 50
    assert all(equal(a, b) for a, b in zip(read(copy), wanted, strict=True))


def shard_flips(path: Path, start: int, end: int, step: int) -> None:
    told = []

    def look(at: int) -> None:
        try:
            read(path.parent)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(f"{path}: is damaged ("), (at, error)
            assert str(error).endswith("; start again with --repair") and "\n" not in str(error)
            told.append(at)

    flips(path, start, end, step, look)
    assert len(told) > 50


def test_a_flipped_bit_of_a_shards_pages_is_refused(copy: Path) -> None:
    shard_flips(copy / shard_name(1), 0, footer_of(copy / shard_name(1)), 13)


def test_a_flipped_bit_of_a_shards_footer_is_refused(copy: Path) -> None:
    path = copy / shard_name(1)
    shard_flips(path, footer_of(path), path.stat().st_size, 7)


@pytest.mark.parametrize("name", [INDEX, VOCABULARY])
def test_a_flipped_bit_of_what_is_read_at_once_is_refused(copy: Path, name: str) -> None:
    def look(_: int) -> None:
        with pytest.raises(ValueError) as refused:
            Cache(copy, name="math")
        assert str(refused.value) == f"math: {copy / name} fails its checksum; start again with --repair"

    flips(copy / name, 0, (copy / name).stat().st_size, 17, look)


def test_every_byte_of_a_page_is_checked(copy: Path) -> None:
    path = copy / shard_name(0)
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    for column in columns:
        if column.path_in_schema not in ("positions", "left_out", "id"):  # these `get` does not ask
            end = column.data_page_offset + column.total_compressed_size

            def look(at: int) -> None:
                with pytest.raises(ValueError, match="is damaged"):
                    read(copy)

            flips(path, end - 2, end, 1, look)


@pytest.mark.parametrize("name", [shard_name(0), INDEX, VOCABULARY])
@pytest.mark.parametrize("left", [0, 3, 50, -200, -1])
def test_a_file_that_is_cut_short_is_refused(copy: Path, name: str, left: int) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError) as refused:
        Cache(copy, name="math")
    assert str(refused.value) == f"math: {path} is cut short or changed; start again with --repair"
    if name.startswith("shard"):
        with pytest.raises(ValueError) as refused:
            shard_facts(path)
        assert str(refused.value).startswith(f"{path}: is damaged (") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [shard_name(1), INDEX, VOCABULARY])
def test_a_file_that_is_missing_is_refused(copy: Path, name: str) -> None:
    cache = Cache(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError) as refused:
        Cache(copy, name="math")
    assert str(refused.value) == f"math: {copy / name} is missing; start again with --repair"
    if name.startswith("shard"):  # lost while the cache is open
        with pytest.raises(ValueError) as refused:
            cache.get(IDS[5])
        assert str(refused.value) == f"{copy / name}: is missing; start again with --repair"


def test_a_parquet_file_of_another_kind_is_no_shard(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.parquet", np.arange(3))
    with pytest.raises(ValueError) as refused:
        shard_facts(tmp_path / "v.parquet")
    assert str(refused.value) == f"{tmp_path / 'v.parquet'}: is no shard of a cache"


def test_another_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    out = artifact(tmp_path, "capture", "a")
    lines = []
    for facts in (None, {}, {"tokenizer": "t", "shards": 0}, {**FACTS, "shards": 0, "cache format": FORMAT - 1}):
        if facts is not None:
            out.publish(facts, 0.0)
        with pytest.raises(ValueError) as refused:
            Cache(out.folder, None, "math")
        lines.append(str(refused.value))
    with pytest.raises(ValueError) as refused:
        Cache(whole, "u", "math")
    another = f"math: the cache {out.folder} has another format than {FORMAT}; capture it again"
    assert [*lines, str(refused.value)] == [
        f"{out.folder}: has no manifest.json: it is not a finished stage folder; run its stage first",
        f"math: {out.folder} is not a cache; give the folder of a capture stage",
        another,
        another,
        f"math: the cache {whole} was made by m, whose tokenizer is not math's; capture it again",
    ]


def test_mass_by_hand() -> None:
    offsets, probs = np.array([0, 2, 2, 3, 3]), np.array([0.5, 0.25, 1.0], dtype=np.float32)
    assert Sparse(offsets, np.arange(3), probs).mass().tolist() == [0.75, 0, 1, 0]
