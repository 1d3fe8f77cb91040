"""Models whose weights or optimizer states lie spread over all ranks: loaded, let go of, divided anew."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fusion import cluster, hub
from fusion.config import Model


def over_ranks(model: Model) -> bool:
    """Whether its weights lie spread over all ranks, which then have to read in step."""
    return model.parallel == "zero3" and cluster.world() > 1


@contextmanager
def loaded(model: Model, folder: Path) -> Iterator[Any]:
    """The model with its weights on this rank's device, or spread over those of all.

    Raises:
        ValueError: it does not load.
        cluster.Stranded: the same, where the others may be loading still.
    """
    if not over_ranks(model):
        yield hub.load_model(model, folder).to(cluster.device())
        return
    with ExitStack() as stack:
        try:
            loading = partitioned(lambda: hub.load_model(model, folder), cluster.precision(model.dtype))
            made = stack.enter_context(loading)
        except (ValueError, OSError, RuntimeError) as error:
            raise cluster.Stranded(str(error)) from error
        yield made


@contextmanager
def partitioned(load: Callable[[], Any], dtype: str) -> Iterator[Any]:
    """A model to read with whose weights lie spread over all ranks (ZeRO-3): each holds its part and asks for the rest.

    Every rank must call the same modules in the same order. Weights are spread while they are loaded.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    held = HfDeepSpeedConfig(settings)  # while it lives, transformers spreads what it loads
    engine = None
    try:
        engine, *_ = deepspeed.initialize(model=load(), config=settings)
        yield engine.module.eval()
    finally:
        if engine is not None:
            engine.destroy()
        del held, engine
        forget()


def forget() -> None:
    """Free the memory of models whose engines were destroyed, and to which nobody else refers.

    DeepSpeed 0.19 keeps them in two globals of ZeRO-3: the stack of modules it is in, whose first is never taken off,
    and a cache of the parameters that a module lets go of.
    """
    import torch
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    wrapper = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(wrapper, "__closure__", None) or ():  # it is cached beneath what marks it for the profiler
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_universal(checkpoint: Path) -> None:
    """Write beside a DeepSpeed checkpoint what any number of ranks can load. One rank calls it; done once, it is kept.

    Raises:
        ValueError: it cannot be read.
    """
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    if (checkpoint / "latest_universal").exists():
        return
    tag = (checkpoint / "latest").read_text().strip()
    asked = Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(checkpoint / f"{tag}_universal"),
        num_extract_workers=1,  # in this process: it is part of a group, and must not be forked
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # transformers' models do not say how they were divided
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            ds_to_universal.main(asked)
        except (AssertionError, KeyError, RuntimeError, ValueError, OSError) as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{checkpoint}: cannot be divided anew ({why}); go on with as many ranks as before"
            ) from None
