"""The stream of tensors through a method: planned from headers, then read, merged and written at the same time.

A few tensors are worked at once, each cut into stretches; a pool of threads takes stretches of all of them, so that
some are read while others are computed and written. What a block comes to depends on nothing but its values, its place
and the seed, and sums are taken in the order of blocks: the bytes are the same for any number of threads and ranks.

A method that must see all tensors before it merges one has a survey: `survey(inputs, parameters, state)` is called for
each tensor, and `conclude(parameters, state, found)` with what all of them gave, by name; it gives the next state, and
whether there is to be another round with it. The last state is `inputs.surveyed`.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion import cluster
from fusion.merge.facts import Facts, report
from fusion.merge.jobs import STORAGE, Job, Layout, numel
from fusion.merge.layout import lay_out
from fusion.merge.lazy import kernels, torch
from fusion.merge.methods import Block, get_method
from fusion.merge.methods.base import block_elements
from fusion.merge.pools import TensorReport
from fusion.merge.recipe import MergeRecipe
from fusion.merge.streamed import HELD_BYTES, STRETCH, Buffers, Streamed
from fusion.merge.writer import OpenShard, PartialFolder, Shard, check_new, shards_of

SHARD_BYTES = 2_000_000_000
_WAITING = 1  # a thread more than compute: while one waits for the disk the others go on
_AT_ONCE = 2  # tensors in work: one's last stretches and the other's first keep all threads busy
_WORKING_BYTES = 800_000_000  # what tensors in work may hold together where a method needs them in full


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, in bytes. The peak comes on top of what the process holds with nothing loaded."""

    layout: Layout
    shards: tuple[Shard, ...]
    threads: int
    at_once: int
    bytes_to_read: int
    bytes_to_write: int
    peak_memory_bytes: int

    @property
    def parameters(self) -> int:
        """Number of weights of the result."""
        return sum(numel(job.shape) for job in self.layout.jobs)


def plan(
    recipe: MergeRecipe | Layout, *, threads: int | None = None, max_shard_bytes: float = SHARD_BYTES
) -> MergePlan:
    """Check all that can be known before a weight is merged, and count bytes; writes nothing.

    Reads headers, and the few tensors that must be the same everywhere. Raises ValueError, one line, for an
    unknown method or parameter, a base that is missing, and folders whose tensors do not correspond.
    """
    if isinstance(recipe, MergeRecipe):
        if recipe.output.kind == "task_vector":  # a difference from the base is taken of it: nothing is to be rounded
            recipe = replace(recipe, dtype="float32")
        recipe = lay_out(recipe)
    layout = recipe
    threads = threads or len(os.sched_getaffinity(0))
    jobs = layout.jobs
    held = max((_held_bytes(job) for job in jobs), default=0)
    scratch = max((_scratch_bytes(job) for job in jobs), default=0)
    at_once = _AT_ONCE
    if scratch:
        at_once = max(1, min(threads, int(_WORKING_BYTES // (held + scratch))))
    rows = max((len(job.models) * (2 if job.statistics else 1) + 1 for job in jobs), default=0)
    # A block and what methods make of it, some six times its size, and a stretch as it is stored.
    widest = max((_itemsize(job) for job in jobs), default=0)
    at_work = (threads + _WAITING) * rows * (block_elements(rows) * 6 * max(4, 2 * widest) + STRETCH * widest)
    return MergePlan(
        layout,
        tuple(shards_of(jobs, max_shard_bytes)),
        threads,
        at_once,
        sum(job.bytes_to_read for job in jobs),
        sum(job.bytes_to_write for job in jobs),
        at_once * (held + scratch) + at_work,
    )


def merge(
    planned: MergePlan,
    out: str | Path,
    *,
    device: str = "cpu",
    on_bytes: Callable[[int], None] | None = None,
) -> list[TensorReport]:
    """Carry out a plan into the folder `out`, which must not exist or be empty; every rank calls it.

    Calls `on_bytes`, on any thread, with the bytes of inputs that a written stretch came from. The folder appears under
    its name when all of it is written; files that were finished before a kill, an interrupt or a full disk are kept
    beside it and taken up by the next merge of the same recipe and models. Raises ValueError for weights that are not
    finite, which leaves nothing, and OSError for the disk.
    """
    out = Path(out).resolve()
    folder = PartialFolder(out, planned.layout.digest)
    cluster.on_main(lambda: _begin(planned, out, folder))
    run = _Run(planned, folder, device, on_bytes or (lambda count: None))
    try:
        cluster.together(run.work)
        notes = cluster.on_main(lambda: _finish(planned, folder))
    except ValueError:
        cluster.on_main(folder.remove)
        raise
    except BaseException:  # an interrupt, a full disk: what is finished is kept
        folder.release()
        raise
    return [TensorReport.from_json(note) for shard in planned.shards for note in notes[shard.name]]


def _begin(planned: MergePlan, out: Path, folder: PartialFolder) -> None:
    check_new(out)
    folder.begin()
    try:
        check_new(out)  # another merge may have been through before this one had the lock
    except ValueError:
        folder.remove()
        raise
    needed = sum(shard.size for shard in planned.shards if folder.report_of(shard) is None)
    if shutil.disk_usage(out.parent).free < needed:
        folder.release()
        raise OSError(errno.ENOSPC, f"{needed} bytes needed: {os.strerror(errno.ENOSPC)}", str(out.parent))


def _finish(planned: MergePlan, folder: PartialFolder) -> dict[str, list[Any]]:
    notes = {shard.name: folder.report_of(shard) or [] for shard in planned.shards}
    folder.finish(planned.layout, planned.shards)
    return notes


class _Run:
    """One rank's part of a merge: whole files, so that no two ranks write the same."""

    def __init__(self, planned: MergePlan, folder: PartialFolder, device: str, on_bytes: Callable[[int], None]) -> None:
        self._planned, self._partial, self._device, self._on_bytes = planned, folder, device, on_bytes
        self._buffers = Buffers()
        self._surveyed: dict[str, Any] = {}

    def work(self) -> None:
        """Merge this rank's files."""
        if not self._asks_torch() and "torch" not in sys.modules:
            return self._with_threads(lambda: None)
        before = torch.get_num_threads()
        alone = partial(torch.set_num_threads, 1)  # the pool has the cores; and one thread sums in one order
        alone()
        try:
            self._with_threads(alone)
        finally:
            torch.set_num_threads(before)

    def _asks_torch(self) -> bool:
        """Whether any tensor is merged by torch's operators: importing it takes as long as to merge a gigabyte."""
        for job in self._planned.layout.jobs:
            views = [*job.models, *job.statistics, *([] if job.base is None else [job.base])]
            narrow = {view.dtype for view in views} | {job.dtype} == {"bfloat16"}
            if job.method is not None and not (narrow and job.scale == 1 and get_method(job.method).compiled):
                return True
        return self._device != "cpu"

    def _with_threads(self, begin: Callable[[], None]) -> None:
        with (
            ThreadPoolExecutor(self._planned.threads + _WAITING, initializer=begin) as pool,
            ThreadPoolExecutor(self._planned.at_once, initializer=begin) as drivers,
        ):
            self._survey(pool, drivers)
            self._merge(pool, drivers)

    def _merge(self, pool: Executor, drivers: Executor) -> None:
        for shard in self._planned.shards if cluster.is_main() else ():
            if self._partial.report_of(shard) is not None:
                self._on_bytes(sum(job.bytes_to_read for job in shard.jobs))
        waiting: list[tuple[OpenShard, list[Future[TensorReport]]]] = []
        try:
            for shard in cluster.share(self._planned.shards):
                if self._partial.report_of(shard) is not None:
                    continue
                opened = OpenShard(shard, self._partial.folder)
                waiting.append((opened, [drivers.submit(self._tensor, job, opened, pool) for job in shard.jobs]))
                while len(waiting) > 1:  # the next file begins while the last tensors of this one are merged
                    self._close(*waiting[0])
                    del waiting[0]
            while waiting:
                self._close(*waiting[0])
                del waiting[0]
        except BaseException:
            for opened, futures in waiting:
                _stop(futures)
                opened.abandon()
            raise

    def _close(self, opened: OpenShard, futures: list[Future[TensorReport]]) -> None:
        for future in as_completed(futures):
            future.result()
        self._partial.note(opened.shard, [future.result().to_json() for future in futures])
        opened.finish()

    def _tensor(self, job: Job, shard: OpenShard, pool: Executor) -> TensorReport:
        """Merge one tensor, or copy it."""
        if job.method is None:
            self._copy(job, shard)
            return TensorReport(job.name, numel(job.shape), job.bytes_to_read, job.layer, job.order, ())
        inputs = self._inputs(job, pool)
        merged = get_method(job.method).merge(inputs, job.parameters)
        share = job.bytes_to_read / max(1, numel(job.shape))

        def work(block: Block) -> Facts:
            part = merged.block(block)
            values = part.values
            if job.scale != 1:
                values = torch.add(block.base, torch.as_tensor(values) - block.base, alpha=job.scale)
            shard.write(job, block.start, _stored(values, job))
            self._on_bytes(int(share * (block.start + block.size)) - int(share * block.start))
            return Facts.of(block, part.kept, part.erased)

        return report(job, merged, inputs.map(work, rows=merged.rows))

    def _inputs(self, job: Job, pool: Executor) -> Streamed:
        return Streamed(
            job,
            pool,
            self._buffers,
            hold=_held_bytes(job) > 0,
            seed=self._planned.layout.seed,
            surveyed=self._surveyed.get(_survey_key(job)),
            device=self._device,
        )

    def _copy(self, job: Job, shard: OpenShard) -> None:
        (view,) = job.models
        for start in range(0, numel(job.shape), STRETCH):
            values: NDArray[Any] = np.empty(min(STRETCH, numel(job.shape) - start), STORAGE[job.dtype])
            view.read(start, values)
            shard.write(job, start, values)
        self._on_bytes(job.bytes_to_read)

    def _survey(self, pool: Executor, drivers: Executor) -> None:
        """Let each method that asks for it see all tensors, as often as it asks; ranks share the tensors."""
        asking: dict[str, list[Job]] = {}
        for job in self._planned.layout.jobs:
            if job.method is not None and get_method(job.method).surveys(job.parameters):
                asking.setdefault(_survey_key(job), []).append(job)
        for key, jobs in asking.items():
            more = True
            while more:
                parts = cluster.together(partial(self._look, cluster.share(jobs), pool, drivers))
                found = {name: value for part in parts for name, value in part.items()}
                module = get_method(str(jobs[0].method)).module
                state = self._surveyed.get(key)
                state, more = module.conclude(jobs[0].parameters, state, {job.name: found[job.name] for job in jobs})
                self._surveyed[key] = state

    def _look(self, jobs: Sequence[Job], pool: Executor, drivers: Executor) -> dict[str, Any]:
        """One round of a survey: what each tensor gave, by name."""

        def look(job: Job) -> Any:
            inputs = self._inputs(job, pool)
            return get_method(str(job.method)).module.survey(inputs, job.parameters, inputs.surveyed)

        futures = [drivers.submit(look, job) for job in jobs]
        try:
            return {job.name: future.result() for job, future in zip(jobs, futures, strict=True)}
        except BaseException:
            _stop(futures)
            raise


def _stored(values: Any, job: Job) -> NDArray[Any]:
    """Merged numbers in the type to write; ValueError where they do not fit."""
    if isinstance(values, np.ndarray) and job.dtype == "bfloat16" and values.dtype == np.float32:
        stored: NDArray[Any] = np.empty(values.size, np.uint16)
        fits = kernels.narrow(values, stored)
    else:
        values = torch.as_tensor(values)
        if job.dtype == "bfloat16" and values.dtype == torch.float32 and values.is_cpu:
            return _stored(values.contiguous().numpy(), job)
        dtype = getattr(torch, job.dtype)
        low, high = torch.aminmax(values) if values.numel() else (values.sum(), values.sum())
        fits = max(-low.item(), high.item()) <= torch.finfo(dtype).max  # what is not a number is not smaller either
        cast = values.to(dtype).cpu().contiguous()
        stored = (cast.view(torch.uint16) if job.dtype == "bfloat16" else cast).numpy()
    if not fits:
        raise ValueError(f"{job.name}: the merged weights do not fit {job.dtype}; set dtype: float32")
    return stored


def _held_bytes(job: Job) -> int:
    """Bytes of a tensor's inputs that stay in memory for the next pass; 0 where there is none, or they are too many."""
    again = job.method is not None and not get_method(job.method).one_pass(job.parameters)
    return job.bytes_to_read if again and job.bytes_to_read <= HELD_BYTES else 0


def _scratch_bytes(job: Job) -> int:
    """What the method holds of a tensor."""
    if job.method is None:
        return 0
    return get_method(job.method).scratch_bytes(job, max(4, 2 * _itemsize(job)))


def _itemsize(job: Job) -> int:
    """Bytes of an element as it is stored, of the widest input."""
    views = (*job.models, *([] if job.base is None else [job.base]))
    return max(np.dtype(STORAGE[view.dtype]).itemsize for view in views)


def _survey_key(job: Job) -> str:
    """Tensors of one method and models are surveyed together, if the parameters that a survey goes by are the same."""
    by = getattr(get_method(job.method).module, "SURVEYED", ()) if job.method is not None else ()
    return f"{job.method} {[getattr(job.parameters, name) for name in by]} {job.order}"


def _stop(futures: Sequence[Future[Any]]) -> None:
    """Drop what has not begun and wait for what has."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()
