"""One sparse cross-entropy fused with the output head: (tokens × V) logits never exist.

With temperature 1, λ·CE(y) + (1 − λ)·CE(p) is one cross-entropy against the sparse vector t = λ·onehot(y) + (1 − λ)·p,
and its gradient in the logits is (Σt)·softmax(z) − t. Loss and both gradients are computed in the forward pass, a block
of positions at a time.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

MissingMass = Literal["ghost", "drop", "renormalise"]


@dataclass(frozen=True, slots=True)
class Targets:
    """What N positions are to learn.

    Attributes:
        labels: int64 (N,), the token that followed.
        ids: int64 (N, K), the taught token ids, distinct within a row where `probs` is positive.
        probs: float (N, K), their probabilities, 0 in places that are not used; a row sums to at most 1.
        label_weight: float (N,), λ: the label's share of the loss; 1 where the position is not taught.
    """

    labels: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    label_weight: torch.Tensor


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Targets,
        missing: MissingMass,
        block: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        wants = [*ctx.needs_input_grad[:2], bias_V is not None and ctx.needs_input_grad[2]]
        d_hidden = torch.zeros_like(hidden_NH) if wants[0] else None
        d_weight = torch.zeros_like(weight_VH, dtype=exact) if wants[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wants[2] else None
        label_loss = hidden_NH.new_zeros(len(hidden_NH), dtype=exact)
        fusion_loss = torch.zeros_like(label_loss)
        for start in range(0, len(hidden_NH), block):
            part = slice(start, start + block)
            hidden = hidden_NH[part]
            bias = None if bias_V is None else bias_V.to(hidden.dtype)
            logits = torch.nn.functional.linear(hidden, weight_VH.to(hidden.dtype), bias).to(exact)
            label_loss[part], fusion_loss[part], d_logits = _block(logits, targets, part, missing, any(wants))
            if d_logits is None:
                continue
            low = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = low @ weight_VH.to(hidden.dtype)
            if d_weight is not None:
                d_weight += (low.T @ hidden).to(exact)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(label_loss, fusion_loss)
        share = targets.label_weight.to(exact)
        return (share * label_loss + (1 - share) * fusion_loss).sum(), label_loss, fusion_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.dtypes[0]),
            None if d_bias is None else (d_bias * d_loss).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _block(
    logits: torch.Tensor, targets: Targets, part: slice, missing: MissingMass, wants: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses (n,) against label and teacher, and the gradient (n, V) of their weighted sum."""
    ids, probs = targets.ids[part], targets.probs[part].to(logits.dtype)
    labels = targets.labels[part, None]
    share = targets.label_weight[part, None].to(logits.dtype)
    total = logits.logsumexp(-1, keepdim=True)
    label_loss = (total - logits.gather(-1, labels))[:, 0]
    mass = probs.sum(-1, keepdim=True)
    if missing == "renormalise":
        probs = probs / mass.clamp_min(torch.finfo(probs.dtype).tiny)
        mass = probs.sum(-1, keepdim=True)
    fusion_loss = (probs * (total - logits.gather(-1, ids))).sum(-1)
    if missing == "ghost":
        others = _others(logits, ids, probs)
        outside = others.logsumexp(-1, keepdim=True)
        # where the kept entries are the whole vocabulary nothing is outside, and nothing is missing either
        open_ = torch.isfinite(outside)
        outside = torch.where(open_, outside, total)
        left = torch.where(open_, (1 - mass).clamp_min(0), 0)
        fusion_loss = fusion_loss + (left * (total - outside))[:, 0]
        mass = mass + left
    if not wants:
        return label_loss, fusion_loss, None
    gradient = logits.sub(total).exp_().mul_(share + (1 - share) * mass)
    if missing == "ghost":  # not softmax·exp(total − outside): that overflows where the student is sure
        gradient.sub_(others.sub_(outside).exp_().mul_((1 - share) * left))
    gradient.scatter_add_(-1, ids, (share - 1) * probs)
    gradient.scatter_add_(-1, labels, -share)
    return label_loss, fusion_loss, gradient


def _others(logits: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The logits (n, V) that no kept entry names, -inf in place of those that one names."""
    cover = torch.zeros_like(logits).scatter_add_(-1, ids, (probs > 0).to(logits.dtype))
    return logits.masked_fill(cover > 0, float("-inf"))


def sparse_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    missing: MissingMass = "ghost",
    block: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ over positions of λ·CE(label) + (1 − λ)·CE(teacher), from hidden states and the output head's weights.

    The teacher's probability that its kept entries lack is, by `missing`: left away (`drop`: the sum Σp of a row scales
    its loss), scaled up (`renormalise`), or compared as one entry with all that the student gives to the other ids
    (`ghost`; its gradient is that of a target which fills the rest in the student's own proportions).

    Args:
        hidden_NH: hidden states at N positions, in the type that the matrix products shall use.
        weight_VH, bias_V: the output head's.
        targets: what to learn; float32 at least is used for all sums.
        block: positions whose logits exist at one time.

    Returns:
        The sum (scalar, differentiable), and label and teacher loss of each position (N,) in nats, for the record.
    """
    return _SparseCrossEntropy.apply(hidden_NH, weight_VH, bias_V, targets, missing, block)  # type: ignore[no-any-return]
