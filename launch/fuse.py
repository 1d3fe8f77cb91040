"""Fuse language models: all stages, from a config file to a released checkpoint.

deepspeed --num_gpus 2 launch/fuse.py --config configs/demo.yaml
"""

import argparse
import errno
import fcntl
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import IO, Any

_STAGES = ("prepare", "capture", "align", "distill", "merge", "release")
_EXAMPLE = """examples:
  deepspeed --num_gpus 8 launch/fuse.py --config configs/fusechat-7b.yaml
  python launch/fuse.py --config configs/demo.yaml --set distill.epochs=4 --set seed=1
  python launch/fuse.py --config configs/fusellm-7b.yaml --plan
  deepspeed --hostfile group-a launch/fuse.py --config configs/fusechat-7b.yaml --target mixtral
"""


def main() -> int:
    """Read the command line, run; 0 when all went well, 2 for what the user can mend."""
    arguments = _parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    locks: list[IO[str]] = []
    config = None
    try:
        from fusion import cluster, config_file

        config = config_file.load(arguments.config, arguments.set)
        if arguments.plan:
            from fusion import costs

            _quieten()
            costs.show(config, calibrate=not arguments.no_calibrate)
            return 0
        refused = None
        try:
            _lock(config.folder, arguments.target, locks)
        except (ValueError, OSError) as error:
            if cluster.world() == cluster.local_world():
                raise
            refused = error  # ranks on other machines wait for this one, and are to hear it
        _run(config, arguments, refused)
    except (ValueError, OSError) as error:
        return cluster.fail(_told(error))
    except Exception as error:
        if isinstance(error, cluster.Stranded):
            return cluster.fail(_told(error))
        # torch and safetensors say a full disk in errors of their own
        if config is None or not (_is_full(config.folder) or os.strerror(errno.ENOSPC) in str(error)):
            if os.environ.get("WORLD_SIZE", "1") != "1":
                time.sleep(5)  # a rank that failed because another did must not be heard before that one
                traceback.print_exc()
                return 1
            raise
        return cluster.fail(_told(OSError(errno.ENOSPC, str(error), str(config.folder))))
    finally:
        for lock in locks:
            lock.close()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/fuse.py",
        description="Fuse several language models into one: prepare, capture, align, distill, merge, release.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file that says what to fuse")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )
    parser.add_argument("--only", nargs="+", choices=_STAGES, default=[], metavar="STAGE", help="do these stages alone")
    parser.add_argument(
        "--from", dest="start", choices=_STAGES, metavar="STAGE", help="begin here; what comes before is finished"
    )
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="NAME",
        help="train these targets alone; other launches may train others of the same run at the same time",
    )
    parser.add_argument(
        "--repair", action="store_true", help="check all finished work; make again what is missing or damaged"
    )
    parser.add_argument("--plan", action="store_true", help="print stages, sizes and costs; run nothing")
    parser.add_argument(
        "--no-calibrate", action="store_true", help="with --plan: do not let the sources that are here read for a while"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # from deepspeed
    arguments = parser.parse_args()
    if arguments.no_calibrate and not arguments.plan:
        parser.error("argument --no-calibrate: goes with --plan alone")
    others = arguments.start or arguments.repair or arguments.plan or arguments.only not in ([], ["distill"])
    if arguments.target and others:
        parser.error(
            "argument --target: goes with the stage distill alone; leave away --only, --from, --repair, --plan"
        )
    if arguments.target:
        arguments.only = ["distill"]
    return arguments


def _quieten() -> None:
    """Leave the terminal to our own lines and bars."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells that DeepSpeed's accumulation steps hold
    warnings.filterwarnings("ignore", category=FutureWarning)


def _run(config: Any, arguments: argparse.Namespace, refused: Exception | None) -> None:
    from fusion import cluster, pipeline

    def check() -> None:
        if refused is not None:
            raise refused

    _quieten()
    with cluster.joined():
        cluster.on_main(check)
        pipeline.run(config, arguments.only, arguments.start, arguments.repair, arguments.target)


def _lock(folder: Path, targets: list[str], held: list[IO[str]]) -> None:
    """Hold the run's folder against a second run; the first rank holds it for all.

    Launches that train some targets each share the folder, and hold their targets.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(".lock", fcntl.LOCK_SH if targets else fcntl.LOCK_EX, f"to {folder}")]
    wanted += [
        (f".lock-{name.replace('/', '_')}", fcntl.LOCK_EX, f"target {name} in {folder}")
        for name in dict.fromkeys(targets)
    ]
    for name, how, what in wanted:
        held.append((folder / name).open("w"))
        try:
            fcntl.flock(held[-1], how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: another run is writing {what}; wait for it, or give this one another `out`"
            ) from None


def _is_full(folder: Path) -> bool:
    return folder.exists() and shutil.disk_usage(folder).free < 2**20


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "the run folder"
        return f"no space left on the disk of {where}; finished work is kept, free some and start again"
    return str(error)


if __name__ == "__main__":
    from fusion import cluster

    cluster.end(main())
