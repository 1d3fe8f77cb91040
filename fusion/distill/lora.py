"""Targets that learn low-rank updates in place of all weights (Hu et al. 2106.09685), by peft."""

import warnings
from pathlib import Path
from typing import Any

from fusion.config import Lora


def add_lora(model: Any, settings: Lora) -> None:
    """Freeze a model and give its linear modules low-rank updates to learn.

    Raises:
        ValueError: peft is missing, or a module that is named is not to be found.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("distill.lora: needs peft; pip install 'fusion[lora]'") from None
    modules = settings.modules if isinstance(settings.modules, str) else list(settings.modules)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    asked = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # it is refused below
            model.add_adapter(asked)
    except ValueError as error:
        raise ValueError(f"distill.lora.modules: {' '.join(str(error).split())[:200]}") from None
    if model.get_output_embeddings() is not head:
        raise ValueError("distill.lora.modules: the output head cannot be among them; leave it away")
    if model.get_input_embeddings() is not embedding:  # tied, it is the head too; ZeRO-3 cannot divide its factors
        raise ValueError("distill.lora.modules: the embedding cannot be among them; leave it away")


def trained(model: Any) -> tuple[int, int]:
    """Weights that learn, and all of them (with ZeRO-3 those of all ranks)."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def merge_lora(pivot: Any, adapter: Path, folder: Path) -> None:
    """Write the pivot with an adapter's updates added to its weights, a model like any other."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft asks transformers by a name that it no longer likes
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        merged: Any = PeftModel.from_pretrained(pivot, str(adapter))
    merged.merge_and_unload().save_pretrained(folder)
