"""A causal model that gives losses in place of logits; and what has to be true of it for that."""

from types import MethodType
from typing import Any

import torch

from fusion.distill.divergence import Objective
from fusion.distill.loss import Shape, Targets, sparse_cross_entropy

# what models of transformers call a factor on their logits, or a divisor
_FACTORS, _DIVISORS, _CAP = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",), "final_logit_softcapping"


def shape_of(model: Any, vocabulary: int) -> Shape:
    """What the model's config says that becomes of its head's product.

    Args:
        vocabulary: ids of its tokenizer; rows of the head beyond are padding, and ids beyond these never occur.
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in _FACTORS:
        scale *= float(getattr(config, name, None) or 1.0)
    for name in _DIVISORS:
        scale /= float(getattr(config, name, None) or 1.0)
    cap = getattr(config, _CAP, None)
    rows = getattr(config, "vocab_size", None) or vocabulary
    return Shape(scale, None if cap is None else float(cap), min(vocabulary, rows))


def fuse_head(model: Any, objective: Objective, shape: Shape) -> None:
    """Make the model return losses and never logits.

    The head stays a module and is called as one, so that DeepSpeed's hooks gather its weights under ZeRO-3. Without
    targets it gives logits still.

    Raises:
        ValueError: the model has no plain output head.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        raise ValueError(f"pivot: {type(model).__name__} has no plain output head; the fused loss needs one")

    def head_forward(head: Any, hidden: torch.Tensor, targets: Targets | None = None) -> Any:
        bias = getattr(head, "bias", None)
        if targets is None:
            return torch.nn.functional.linear(hidden, head.weight, bias)
        return sparse_cross_entropy(hidden, head.weight, bias, targets, objective, shape)

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        labels: torch.Tensor,
        taught_ids: torch.Tensor,
        taught_probs: torch.Tensor,
        label_weight: torch.Tensor,
        weight: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        hidden = _body(self, input_ids, position_ids).flatten(0, 1)[rows]
        targets = Targets(labels, taught_ids, taught_probs, label_weight, weight)
        return self.get_output_embeddings()(hidden, targets)  # type: ignore[no-any-return]

    head.forward = MethodType(head_forward, head)
    model.forward = MethodType(forward, model)


def freeze_embeddings(model: Any) -> None:
    """Keep input embeddings and output head as they are: no gradient, no memory of the optimizer for them.

    Adam moves a row as far for gradients that are noise as for gradients that agree, and most ids of a small corpus
    hardly occur in it.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def _body(model: Any, ids: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states (B, T, H) of a fused model."""
    given = {} if places is None else {"position_ids": places}
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: Any, shape: Shape) -> None:
    """Refuse a fused model whose own logits are not what head and shape make of its body's hidden states.

    Under ZeRO-3 all ranks must call this together.

    Raises:
        ValueError: it does more to them, in a way that is not known here.
    """
    ids = _some_ids(model, 4)
    wanted = type(model).forward(model, input_ids=ids, use_cache=False).logits.float()
    found = model.get_output_embeddings()(_body(model, ids)).float() * shape.scale
    if shape.softcap is not None:
        found = shape.softcap * (found / shape.softcap).tanh()
    least = 2e-2 * float(wanted.abs().max())  # also where a pivot that was never trained has hardly any logits
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=2e-2, atol=least):
        raise ValueError(
            f"pivot: {type(model).__name__} changes its logits after the output head in a way that is not known here; "
            "the fused loss needs the head's own, scaled or soft-capped at most"
        )


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether samples that share a row of a fused model do not see each other. Under ZeRO-3 all ranks call together."""
    ids = _some_ids(model, 11).repeat(2, 1)
    ids[1, :4] = ids[1, :4].flip(0)  # the second sample stands behind another one here
    places = torch.tensor([*range(4), *range(7)], device=ids.device).repeat(2, 1)
    try:
        if skips_unseen(model):  # it looks at the places where the batch is of one row alone
            rows = [_body(model, ids[n : n + 1], places[n : n + 1]) for n in range(len(ids))]
            together = torch.cat(rows).float()
        else:
            together = _body(model, ids, places).float()
    except (TypeError, ValueError):  # a body that takes no positions
        return False
    apart = torch.cat([_body(model, ids[:1, :4]), _body(model, ids[:1, 4:])], dim=1).float()
    least, size = (2e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4), float(apart.abs().max())
    unseen = torch.allclose(together[0, 4:], together[1, 4:], rtol=1e-6, atol=1e-6 * size)
    return unseen and torch.allclose(together[:1], apart, rtol=least, atol=least * size)


def skips_unseen(model: Any) -> bool:
    """Whether attention costs nothing between samples of a row that do not see each other."""
    return str(getattr(model.config, "_attn_implementation", "")).startswith("flash")


def _some_ids(model: Any, count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, device=next(model.parameters()).device)[None]
