"""What was finished and is damaged, lost or another's: named and refused, or made again where the user says so."""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from fusion import pipeline, tracking
from fusion.capture.cache import Cache
from fusion.config import Config

CAPTURED = ("prepare", "capture", "align")
HINT = "leave away its `cache`, or start with --repair, to capture it here"


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Any,
    byte_level_tokenizer: PreTrainedTokenizerFast,
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    pivot = tiny_llama(folder / "pivot", sentencepiece_tokenizer)
    return tiny.tree(folder, pivot, {"a": tiny_llama(folder / "a", byte_level_tokenizer, seed=1)})


@pytest.fixture
def config(tmp_path: Path, tree: dict[str, Any]) -> Config:
    """A fusion whose sources are captured and aligned."""
    made = tiny.load(tmp_path, {**tree, "out": str(tmp_path / "run")})
    pipeline.run(made, CAPTURED)
    return made


@pytest.fixture
def said(config: Config, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the run tells after `config` is made."""
    told = io.StringIO()
    monkeypatch.setattr(tracking.console, "file", told)
    return told


def folder_of(config: Config, label: str) -> Path:
    return next(config.folder.glob(f"{label}-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "lost": Path.unlink}


@pytest.mark.parametrize("name", ["shard-000001.parquet", "vocabulary.parquet", "index.parquet"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_and_repaired(config: Config, said: io.StringIO, name: str, damage: str) -> None:
    cache = folder_of(config, "capture/a")
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in cache.iterdir() if path.is_file()}
    DAMAGE[damage](cache / name)
    shutil.rmtree(folder_of(config, "align/a"))
    with pytest.raises(ValueError) as refused:
        pipeline.run(config, CAPTURED)
    assert str(cache / name) in str(refused.value) and "--repair" in str(refused.value)
    assert "\n" not in str(refused.value)
    pipeline.run(config, CAPTURED, repair=True)
    assert f"capture/a: {name} {'is missing' if damage == 'lost' else 'fails its checksum'}: it is made again" in (
        said.getvalue().replace("\n", " ")
    )
    for path, (content, inode) in before.items():
        if path.name == "manifest.json":  # but for how long it took
            assert json.loads(path.read_text())["files"] == json.loads(content)["files"]
        else:
            assert path.read_bytes() == content
            assert path.stat().st_ino == inode or path.name in (name, "index.parquet")
    assert folder_of(config, "align/a").exists() and len(Cache(cache)) == 38  # two of the 40 are validation's


def test_a_repair_leaves_alone_what_is_whole(config: Config, said: io.StringIO) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.folder.rglob("*") if path.is_file()}
    pipeline.run(config, CAPTURED, repair=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert said.getvalue().count("done before") == 4


def test_another_stage_is_repaired_whole(config: Config) -> None:
    map = folder_of(config, "align/a") / "map.safetensors"
    before = load_file(map)
    flip(map)
    pipeline.run(config, CAPTURED, repair=True)
    after = load_file(map)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


# A cache that another run captured


@pytest.fixture
def given(tmp_path: Path, tree: dict[str, Any], config: Config) -> Callable[..., Config]:
    """given(**changes of the tree, source=…): a fusion elsewhere that is given the cache of `config`."""

    def act(source: Path | None = None, **changes: Any) -> Config:
        entry = {**tree["sources"][0], "cache": str(folder_of(config, "capture/a"))}
        if source is not None:
            entry["model"] = str(source)
        there = tmp_path / "there"
        there.mkdir(exist_ok=True)
        return tiny.load(there, {**tree, "out": str(there / "run"), **changes, "sources": [entry]})

    return act


def captured(config: Config) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in config.folder.glob("capture/*"))


def test_a_given_cache_serves(given: Callable[..., Config]) -> None:
    config = given()
    pipeline.run(config, CAPTURED)
    assert captured(config) == ["pivot"]


def test_a_cache_of_another_revision_is_refused(
    tmp_path: Path, given: Callable[..., Config], tree: dict[str, Any], tiny_llama: Any, byte_level_tokenizer: Any
) -> None:
    other = tiny_llama(tmp_path / "other", byte_level_tokenizer, seed=2)
    config = given(source=other)
    with pytest.raises(ValueError) as refused:
        pipeline.run(config, CAPTURED)
    made_by = tree["sources"][0]["model"]
    why = f"was made by {made_by}, and {other} is another model or revision"
    assert str(refused.value) == f"a: the cache {config.sources[0].cache} {why}; {HINT}"
    pipeline.run(config, CAPTURED, repair=True)
    assert captured(config) == ["a", "pivot"]


def test_a_cache_of_changed_samples_is_refused(
    tmp_path: Path, given: Callable[..., Config], tree: dict[str, Any]
) -> None:
    rows = [json.loads(line) for line in Path(tree["prepare"]["data"][0]["data"]).read_text().splitlines()]
    rows[3]["text"] += " changed"
    train = tiny.write_lines(tmp_path / "changed.jsonl", rows)
    config = given(prepare={"data": [{"data": str(train)}, tree["prepare"]["data"][1]]})
    with pytest.raises(ValueError) as refused:
        pipeline.run(config, CAPTURED)
    said = str(refused.value)
    assert said.startswith(f"a: the cache {config.sources[0].cache} lacks 1 of 38 samples, ") and said.endswith(HINT)
    pipeline.run(config, CAPTURED, repair=True)
    assert captured(config) == ["a", "pivot"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_given_cache_is_refused(given: Callable[..., Config], damage: str) -> None:
    config = given()
    shard = Path(str(config.sources[0].cache)) / "shard-000002.parquet"
    DAMAGE[damage](shard)
    content = shard.read_bytes() if shard.exists() else None
    with pytest.raises(ValueError) as refused:
        pipeline.run(config, CAPTURED)
    assert str(shard) in str(refused.value) and str(refused.value).endswith(HINT)
    pipeline.run(config, CAPTURED, repair=True)
    assert captured(config) == ["a", "pivot"]
    assert (shard.read_bytes() if shard.exists() else None) == content, "another run's folder is its own"


def test_a_given_cache_without_manifest_is_captured_here(given: Callable[..., Config]) -> None:
    config = given()
    (Path(str(config.sources[0].cache)) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: is damaged"):
        pipeline.run(config, CAPTURED)
    pipeline.run(config, CAPTURED, repair=True)
    assert captured(config) == ["a", "pivot"]


def test_the_pivots_cache_is_looked_at_too(tmp_path: Path, tree: dict[str, Any], config: Config) -> None:
    there = tmp_path / "there"
    there.mkdir()
    pivot = {**tree["pivot"], "cache": str(folder_of(config, "capture/a"))}
    with pytest.raises(ValueError, match="pivot: the cache .* is another model or revision"):
        pipeline.run(tiny.load(there, {**tree, "out": str(there / "run"), "pivot": pivot}), CAPTURED)


def test_a_cache_of_another_template_is_refused(given: Callable[..., Config]) -> None:
    config = given()
    config = replace(config, sources=(replace(config.sources[0], template="plain"),))
    with pytest.raises(ValueError, match="was captured with another chat template"):
        pipeline.run(config, CAPTURED)


def test_a_damaged_manifest_costs_no_shard(config: Config) -> None:
    cache = folder_of(config, "capture/a")
    before = {path.name: path.stat().st_ino for path in cache.glob("shard-*.parquet")}
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: is damaged"):
        pipeline.run(config, CAPTURED)
    pipeline.run(config, CAPTURED, repair=True)
    assert {path.name: path.stat().st_ino for path in cache.glob("shard-*.parquet")} == before


# What may be left out


def test_samples_left_out_are_refused_later(tmp_path: Path, tree: dict[str, Any], tiny_llama: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tree["sources"][0]["model"])
    short = tiny_llama(tmp_path / "short", tokenizer, max_position_embeddings=20)
    sources = [{"name": "a", "model": str(short), "dtype": "float32"}]
    skips = tiny.load(
        tmp_path, {**tree, "out": str(tmp_path / "run"), "sources": sources, "capture": {"too_long": "skip"}}
    )
    pipeline.run(skips, ("prepare", "capture"))
    cache = Cache(folder_of(skips, "capture/a"))
    assert 0 < len(cache) < 40 and set(cache.left_out.values()) == {"longer than the context"}
    refuses = replace(skips, capture=replace(skips.capture, too_long="refuse"))
    with pytest.raises(ValueError, match=r"was captured without sample \w{16} \(longer than the context\)"):
        pipeline.run(refuses, ("prepare", "capture"))
    pipeline.run(skips, CAPTURED)


def test_the_door_knows_repair(tmp_path: Path) -> None:
    """It is an option of launch/fuse.py."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "launch/fuse.py", "--help"],
        cwd=tiny.ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--repair" in done.stdout
