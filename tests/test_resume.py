"""A capture that is killed goes on: at any moment, whoever of its processes it was, to the same bytes."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import artifact, free_port, samples

from fusion import cluster
from fusion.artifact import Artifact
from fusion.capture import stage
from fusion.capture.cache import Cache
from fusion.config import Capture, Config, Dataset, Model, Prepare
from fusion.corpus import Corpus, write_samples
from fusion.measure import read

KILLS, TEXTS = 20, 400


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, byte_level_tokenizer: Any) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source"), byte_level_tokenizer, initializer_range=0.4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_samples(folder / "train.parquet", samples(TEXTS, words=20))
    return folder


def configured(source: Path, **settings: Any) -> Config:
    model = Model(str(source), "a", dtype="float32", parallel=settings.pop("parallel", "none"))
    capture = Capture(**{"sampler": "hybrid", "head": 4, "draws": 8, "batch_tokens": 256, **settings})
    return Config("small", Model("none"), (model,), Prepare((Dataset("none.jsonl"),)), capture=capture)


def start(ranks: int, work: Callable[[], None], joins: bool = False) -> list[int]:
    """Fork ranks of one process group, which `work` may join itself: imports are paid for once. Gives their numbers."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in told.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 1)
                if ranks > 1 and not joins:
                    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def join(children: list[int], patience: float = 60) -> list[int]:
    """Exit statuses, a signal's number negative; who has not ended in time is killed."""
    left, statuses, deadline = set(children), {}, time.monotonic() + patience
    while left:
        for child in sorted(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                left.remove(child)
                statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses and any(statuses.values()):
            deadline = min(deadline, time.monotonic() + 5)  # as a launcher does when one of its ranks has died
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def capture(out: Artifact, config: Config, source: Path, prepared: Path) -> Callable[[], None]:
    def work() -> None:
        facts = stage.run(config, {"prepare": prepared, "model": source}, out)
        if os.environ["RANK"] == "0":
            out.publish(facts, 0.0)

    return work


def content(out: Artifact) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, source: Path, prepared: Path) -> dict[str, bytes]:
    out = artifact(tmp_path_factory.mktemp("undisturbed"), "capture", "a")
    assert join(start(2, capture(out, configured(source), source, prepared))) == [0, 0]
    assert len(Cache(out.folder)) == TEXTS and len(content(out)) == Corpus(prepared, "train").groups + 2
    return content(out)


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks_writes_the_same(
    tmp_path: Path, source: Path, prepared: Path, undisturbed: dict[str, bytes], ranks: int
) -> None:
    out = artifact(tmp_path, "capture", "a")
    assert join(start(ranks, capture(out, configured(source), source, prepared))) == [0] * ranks
    assert content(out) == undisturbed


def test_twenty_kills(tmp_path: Path, source: Path, prepared: Path, undisturbed: dict[str, bytes]) -> None:
    """One rank or all of them, of two or of one, at random moments; each time it goes on, at last undisturbed."""
    chance, config = random.Random(0), configured(source)
    shards = len(undisturbed) - 2
    kills: list[int] = []
    for attempt in range(10 * KILLS):
        out = artifact(tmp_path / str(attempt), "capture", "a")
        at_most = 0
        while len(kills) < KILLS and at_most < shards:
            children = start(chance.choice([1, 2]), capture(out, config, source, prepared))
            at_most = min(at_most + chance.randint(0, 6), shards)  # shards that this one may finish
            while written(out) < at_most and not any_ended(children):
                time.sleep(0.001)
            time.sleep(chance.choice([0, 0.01, 0.1, 0.5]) * chance.random())
            for victim in chance.choice([children, children[-1:]]):
                os.kill(victim, signal.SIGKILL)
            if any(status == -signal.SIGKILL for status in join(children)):
                kills.append(written(out))
        assert join(start(2, capture(out, config, source, prepared))) == [0, 0]
        assert content(out) == undisturbed
        assert len(Cache(out.folder)) == TEXTS and not list(out.folder.rglob("*.part"))
        if len(kills) == KILLS:
            break
    assert len(set(kills)) > 5, f"they met few kinds of moments: {kills}"


def written(out: Artifact) -> int:
    return len(list(out.folder.glob("shard-*.parquet")))


def any_ended(children: list[int]) -> bool:
    """Whether one is through, without taking note of it."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, child, flags) is not None for child in children)


@pytest.mark.parametrize("sampler", ["hybrid", "top_k"])
def test_weights_spread_over_ranks_say_the_same(
    tmp_path: Path, source: Path, prepared: Path, undisturbed: dict[str, bytes], sampler: str
) -> None:
    """ZeRO-3: ranks whose samples run out, or are fewer, take part until all are through."""
    whole, spread = artifact(tmp_path / "whole", "capture", "a"), artifact(tmp_path / "spread", "capture", "a")
    assert join(start(1, capture(whole, configured(source, sampler=sampler), source, prepared))) == [0]
    for name in ("shard-000003.parquet", "shard-000011.parquet", "vocabulary.parquet"):
        assert not (spread.folder / name).exists()
    work = capture(spread, configured(source, sampler=sampler, parallel="zero3"), source, prepared)

    def joined() -> None:
        warnings.simplefilter("ignore")  # as launch/fuse.py has it: DeepSpeed calls what torch is giving up
        cluster.start()
        work()

    assert join(start(2, joined, joins=True), patience=200) == [0, 0]
    one, other = Cache(whole.folder), Cache(spread.folder)
    assert list(one.ids()) == list(other.ids())
    for id in one.ids():
        a, b = one.get(id), other.get(id)
        assert a is not None and b is not None
        assert (a.ids == b.ids).all() and np.abs(a.logp - b.logp).max() < 5e-3


def test_weights_spread_over_ranks_measure_the_same_and_are_let_go(tmp_path: Path, source: Path) -> None:
    """Batches that do not come out even; nothing is left behind."""
    asked = Model(str(source), "a", dtype="float32")
    whole = read(asked, source, samples(5), 1)

    def work() -> None:
        warnings.simplefilter("ignore")
        cluster.start()
        found = read(replace(asked, parallel="zero3"), source, samples(5), 1)
        np.save(tmp_path / f"{cluster.rank()}.npy", found.nats)
        assert not [held for held in gc.get_objects() if type(held).__name__ == "DeepSpeedEngine"]
        assert not [held for held in gc.get_objects() if isinstance(held, torch.Tensor) and hasattr(held, "ds_tensor")]

    assert join(start(2, work, joins=True), patience=200) == [0, 0]
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), whole.nats, rtol=1e-4)


def test_a_rank_that_cannot_go_on_stops_the_others(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: Any
) -> None:
    long = Corpus(prepared, "train").group(0)[0]
    most = len(byte_level_tokenizer.encode(str(long.text))) + 1
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=most)
    out = artifact(tmp_path, "capture", "a")
    assert join(start(2, capture(out, configured(source), source, prepared))) == [1, 1]
    assert len(content(out)) < Corpus(prepared, "train").groups // 2


def test_a_full_disk_loses_nothing(tmp_path: Path, source: Path, prepared: Path, undisturbed: dict[str, bytes]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    small = sum(map(len, undisturbed.values())) // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={small}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk of a chosen size can be made here")
    try:
        out = artifact(disk, "capture", "a")
        read, write = os.pipe()
        work = capture(out, configured(source), source, prepared)

        def tells() -> None:
            try:
                work()
            except OSError as error:
                os.write(write, str(error.errno).encode())
                raise

        assert join(start(1, tells)) == [1] and int(os.read(read, 9)) == errno.ENOSPC
        kept = {name: held for name, held in content(out).items() if undisturbed.get(name) == held}
        assert len(kept) > 2 and kept.keys() == content(out).keys() and not list(out.folder.rglob("*.part"))
        times = {name: (out.folder / name).stat().st_mtime_ns for name in kept}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert join(start(2, work)) == [0, 0]
        assert content(out) == undisturbed
        again = {name for name, at in times.items() if (out.folder / name).stat().st_mtime_ns != at}
        assert len(again) <= 1, "a shard may be whole and its line in the journal not; more are not done twice"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
