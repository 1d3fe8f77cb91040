"""Ranks: who am I, which share of the work is mine, and where all meet. `deepspeed` is imported here and in spread."""

import io
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_LONGEST_MEETING = timedelta(minutes=30)  # at the start
_LONGEST_WAIT = timedelta(days=7)  # in the course of the work
_LONGEST_COMPILE_S, _LONGEST_LOOK_S = 900, 120  # of a DeepSpeed op, and of one that was compiled before
_FIRST_S = 3  # what all ranks meet is said by the first of them, before the launcher stops the others
_CLOSED = "closed"


def rank() -> int:
    """This process's number among all, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    """How many processes the launcher started on all machines, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one rank that talks and writes manifests."""
    return rank() == 0


def local_world() -> int:
    """How many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def cores() -> int:
    """This rank's share of its machine's cores, at least 1."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // local_world())


class Stranded(RuntimeError):
    """What stops one rank in the middle of what all take part in: the others wait for it and cannot be told."""


def start() -> None:
    """Join the process group (NCCL with GPUs, gloo without), also when this process is alone.

    A lone process gets the launcher's variables, so that one code path trains under `deepspeed` and plain `python`.
    Threads are shared out among the ranks of one machine: two ranks with all cores each crawl.
    """
    import torch

    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(cores()))))
    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # told, DeepSpeed does not guess and warn
        if os.access(sys.prefix, os.W_OK):  # its CPU op is compiled once for this environment, not again for each
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    _drop_stale_locks(_prefer_own_ninja())
    import deepspeed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, many = next(torch.distributed.rendezvous("env://", timeout=_LONGEST_MEETING))
    except torch.distributed.DistError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        told = f"the ranks do not meet at {address}:{port}: {' '.join(str(error).split())[:160]}"
        if "EADDRINUSE" in str(error):
            told = f"port {port} is another run's; start this one with deepspeed --master_port NUMBER"
        raise ValueError(told) from None
    store.set_timeout(_LONGEST_WAIT)  # while one rank downloads, hashes or merges what can be hundreds of gigabytes
    bound = torch.device("cuda", local_rank()) if backend == "nccl" and many > 1 else None
    torch.distributed.init_process_group(
        backend, store=store, rank=number, world_size=many, timeout=_LONGEST_WAIT, device_id=bound
    )
    with redirect_stdout(io.StringIO()):  # each rank says that its CPU op was built
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_LONGEST_WAIT)


def stop() -> None:
    """Leave the process group; safe to call where none was joined."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with suppress(RuntimeError):  # a peer that is gone already must not turn a finished run into a failed one
            torch.distributed.destroy_process_group()


@contextmanager
def joined() -> Iterator[None]:
    """Within the process group.

    A process in which something was raised, and which is not alone, is left in it: to leave waits for what the others
    may be in the middle of, which wait for this one. It has to end by `end`.
    """
    start()
    try:
        yield
    except BaseException:
        if world() == 1:
            stop()
        raise
    stop()


def fail(error: Exception | str) -> int:
    """Say in one line what is in a user's way, from the first rank that meets it; the exit status for it, 2."""
    if not is_main():
        time.sleep(_FIRST_S)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def end(status: int) -> None:
    """End this process; where it failed and is not alone at once, so that the launcher stops the others."""
    if status == 0 or world() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def device() -> Any:
    """The torch.device this rank computes on."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def precision(wanted: str) -> str:
    """The type to compute in: `auto` is bfloat16 where this device multiplies it natively, else float32.

    A CPU without AVX-512 or AMX for bfloat16 takes up to a hundred times as long for it as for float32.
    """
    import torch

    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    can = torch.cpu.get_capabilities()
    return "bfloat16" if any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")) else "float32"


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        import torch

        torch.distributed.barrier()


def share(items: Sequence[T]) -> list[T]:
    """This rank's items: every world()-th, beginning at its own number."""
    return list(items[rank() :: world()])


def claims(items: Sequence[T], folder: Path) -> Iterator[T]:
    """The items that this rank is the first to ask for: a rank that is done with one takes the next.

    A claim is an empty file in `folder`, which all ranks see and which must be gone before the first of them asks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        if (folder / _CLOSED).exists():
            return
        with suppress(FileExistsError):
            os.close(os.open(folder / f"claim-{item}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            yield item


def close_claims(folder: Path) -> None:
    """Nobody gets anything more from `claims`: one rank cannot go on, and the others need not."""
    with suppress(OSError):  # on a full disk they find out by themselves
        (folder / _CLOSED).touch()


def in_step(items: Iterable[T], work: Callable[[T | None], None]) -> None:
    """Do `work` for each item, all ranks at the same time: for work in which all ranks take part in each other's.

    A rank that has no more items works on None until all are through. What one raises (ValueError, OSError) stops all
    of them and is raised by that one; see `together`.
    """
    failure: Exception | None = None
    waiting = iter(items)
    while True:
        item = None
        try:
            item = next(waiting, None) if failure is None else None
        except (ValueError, OSError) as error:
            failure = error
        busy, failed = most([item is not None, failure is not None])
        if failed or not busy:
            break
        try:
            work(item)
        except (ValueError, OSError) as error:
            failure = error
    if failure is not None:
        raise failure


def most(values: Sequence[int]) -> list[int]:
    """The largest of all ranks' values, one by one."""
    if world() == 1:
        return [int(v) for v in values]
    import torch

    held = torch.tensor([int(v) for v in values], device=device())
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    return [int(v) for v in held]


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world() == 1:
        return [value]
    import torch

    boxes: list[Any] = [None] * world()
    torch.distributed.all_gather_object(boxes, value)
    return boxes


def _drop_stale_locks(own: bool) -> None:
    """Remove locks left by a process that was killed while it compiled: whoever comes later would wait for ever.

    Args:
        own: the ninja is always the same, so that what was compiled once is only looked at.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in folder.glob("**/lock"):
        with suppress(FileNotFoundError):  # another rank was first
            longest = _LONGEST_LOOK_S if own and any(lock.parent.glob("*.so")) else _LONGEST_COMPILE_S
            if time.time() - lock.stat().st_mtime > longest:
                lock.unlink()


def _prefer_own_ninja() -> bool:
    """Let torch find this environment's ninja first, if there is one: to another, all is to be compiled anew."""
    scripts = sysconfig.get_path("scripts")
    there = os.access(os.path.join(scripts, "ninja"), os.X_OK)
    if there:
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    return there


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its value to all; its ValueError or OSError is raised on every rank."""
    outcome: tuple[bool, Any] = (True, None)
    if is_main():
        try:
            outcome = (True, work())
        except (ValueError, OSError) as error:
            outcome = (False, error)
    good, value = broadcast(outcome)
    if not good:
        barrier()  # all have heard it before one ends
        raise value
    return value


def together(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and wait for all; what one raises (ValueError, OSError) is raised on all, none hangs."""
    try:
        outcome: tuple[bool, Any] = (True, work())
    except (ValueError, OSError) as error:
        outcome = (False, error)
    outcomes = gather(outcome)
    for good, value in outcomes:
        if not good:
            barrier()
            raise value
    return [value for _, value in outcomes]
