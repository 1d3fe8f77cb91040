"""One sparse cross-entropy fused with the output head: (tokens × V) logits never exist.

With temperature 1, λ·CE(y) + (1 − λ)·CE(p) is one cross-entropy against the sparse vector t = λ·onehot(y) + (1 − λ)·p,
and its gradient in the logits is (Σt)·softmax(z) − t. Every objective offered here has a gradient of that form: a
multiple of the softmax, another multiple of it on ids without an entry, and a number for each entry. So loss and both
gradients are computed in the forward pass, a block of positions at a time, in one buffer of logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusion.distill.divergence import Objective, measure

_CPU_CELLS = 1 << 24  # logits of a block
_GPU_CELLS = 1 << 26
_SLICE = 8192  # rows of the head whose gradient is added up, or handed over, at a time


@dataclass(frozen=True, slots=True)
class Targets:
    """What N positions are to learn.

    Attributes:
        labels: int64 (N,), the token that followed.
        ids: int64 (N, K), the taught token ids, distinct within a row where `probs` is positive.
        probs: float (N, K), their probabilities, 0 in places that are not used; a row sums to at most 1.
        label_weight: float (N,), λ: the label's share of the loss; 1 where the position is not taught.
        weight: float (N,), what the position's loss is multiplied by, 0 to leave it out; None: 1 everywhere.
    """

    labels: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    label_weight: torch.Tensor
    weight: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model makes of its head's product before the softmax.

    Attributes:
        scale: the product is multiplied by it (Cohere, Granite).
        softcap: and then held within ± this: c·tanh(z / c) (Gemma 2).
        vocabulary: token ids; rows of the head from there on are padding: part of the softmax, never of a target.
            None: all rows are tokens.
    """

    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Targets,
        objective: Objective,
        shape: Shape,
        block: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        wants = [*ctx.needs_input_grad[:2], bias_V is not None and ctx.needs_input_grad[2]]
        d_hidden = torch.empty_like(hidden_NH) if wants[0] else None
        d_weight = torch.zeros_like(weight_VH, dtype=exact) if wants[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wants[2] else None
        total = hidden_NH.new_zeros((), dtype=exact)
        label_loss = hidden_NH.new_zeros(len(hidden_NH), dtype=exact)
        fusion_loss = torch.zeros_like(label_loss)
        weight = weight_VH.to(hidden_NH.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_NH.dtype)
        for start in range(0, len(hidden_NH), block):
            part = slice(start, start + block)
            hidden = hidden_NH[part]
            logits = torch.nn.functional.linear(hidden, weight, bias).to(exact)
            loss, label_loss[part], fusion_loss[part] = _block(logits, targets, part, objective, shape, any(wants))
            total += loss
            if not any(wants):
                continue
            d_logits = logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits, hidden)
            if d_bias is not None:
                d_bias += logits.sum(0)
        ctx.save_for_backward(d_hidden)
        ctx.of_head = (d_weight, d_bias)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(label_loss, fusion_loss)
        return total, label_loss, fusion_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        if ctx.of_head is None:
            raise RuntimeError("the fused loss was gone through backwards before; its gradients are handed over once")
        d_weight, d_bias = ctx.of_head
        if d_weight is not None and ctx.dtypes[0].itemsize < d_weight.dtype.itemsize:
            ctx.of_head = None
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else _handed_over(d_weight, d_loss, ctx.dtypes[0]),
            None if d_bias is None else (d_bias * d_loss).to(ctx.dtypes[1]),
            *[None] * 4,
        )


def _add_product(total_VH: torch.Tensor, d_logits_NV: torch.Tensor, hidden_NH: torch.Tensor) -> None:
    """total += d_logitsᵀ·hidden; in float32 also where the factors are of lower precision, without a second (V, H)."""
    if total_VH.dtype == hidden_NH.dtype:
        total_VH.addmm_(d_logits_NV.T, hidden_NH)
        return
    for start in range(0, len(total_VH), _SLICE):
        rows = slice(start, start + _SLICE)
        total_VH[rows] += d_logits_NV[:, rows].T @ hidden_NH


def _handed_over(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total·factor in another type. A narrower one takes the memory of `total`, which is lost: (V, H) exists once."""
    if dtype.itemsize >= total.dtype.itemsize:
        return (total * factor).to(dtype)
    wide, narrow = total.view(-1), total.view(-1).view(dtype)
    step = _SLICE * total.shape[-1]
    for start in range(0, len(wide), step):  # ascending: what is written lies before what is still to be read
        part = (wide[start : start + step] * factor).to(dtype)
        narrow[start : start + len(part)] = part
    return narrow[: len(wide)].view(total.shape)


def _block(
    logits: torch.Tensor, targets: Targets, part: slice, objective: Objective, shape: Shape, wants: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted loss (scalar), and losses (n,) against label and teacher; `logits` (n, V) become their own gradient."""
    ids, probs = targets.ids[part], targets.probs[part].to(logits.dtype)
    labels = targets.labels[part, None]
    share = targets.label_weight[part, None].to(logits.dtype)
    weight = torch.ones_like(share) if targets.weight is None else targets.weight[part, None].to(logits.dtype)
    width = logits.shape[-1] if shape.vocabulary is None else shape.vocabulary
    heat, smooth = objective.student_temperature, objective.label_smoothing
    if shape.scale != 1:
        logits.mul_(shape.scale)
    if shape.softcap is not None:
        logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    slope = None  # of the cap, where the logits are
    if shape.softcap is not None and wants:
        slope = logits.div(shape.softcap).square_().neg_().add_(1)
    at_label, kept = logits.gather(-1, labels), logits.gather(-1, ids)
    mean = logits[:, :width].mean(-1, keepdim=True) if smooth else at_label
    # entries are taken out, and everything without one becomes exp(z − top), once
    logits.scatter_reduce_(-1, ids, torch.where(probs > 0, float("-inf"), float("inf")).to(logits.dtype), "amin")
    kept = kept.masked_fill(probs <= 0, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    others = logits.sub_(top).exp_()
    plain = _Sums.of(others, kept, top, width)
    warm = others.pow(1 / heat) if heat != 1 else others
    shares = _Sums.of(warm, kept / heat, top / heat, width) if heat != 1 else plain
    label_loss = plain.total - at_label
    found = measure(probs, kept / heat - shares.total, shares.rest - shares.total, objective)
    fusion_loss = heat**2 * found.value
    smoothed = (1 - smooth) * label_loss + smooth * (plain.total - mean)
    loss = (weight * (share * smoothed + (1 - share) * fusion_loss[:, None])).sum()
    if not wants:
        return loss, label_loss[:, 0], fusion_loss
    of_label, of_teacher = weight * share, weight * (1 - share) * heat
    pull = found.kept.sum(-1, keepdim=True) + found.rest  # Σ q·∂f/∂q: what the softmax is multiplied by
    bucket = torch.where(shares.sum > 0, found.rest / shares.sum.clamp_min(torch.finfo(logits.dtype).tiny), 0)
    softmax, warmed = (top - plain.total).exp(), (top / heat - shares.total).exp()  # what `others` are divided by
    if heat != 1:
        warm[:, :width] *= of_teacher * (bucket - pull * warmed)
        warm[:, width:] *= -of_teacher * pull * warmed
        others.mul_(of_label * softmax).add_(warm)
    else:
        both = of_label * softmax - of_teacher * pull * warmed
        others[:, :width] *= both + of_teacher * bucket
        others[:, width:] *= both
    if smooth:
        others[:, :width] -= of_label * smooth / width
    entries = of_label * (kept - plain.total).exp()
    entries += of_teacher * (found.kept - pull * (kept / heat - shares.total).exp())
    others.scatter_add_(-1, ids, entries)
    others.scatter_add_(-1, labels, -of_label * (1 - smooth))
    if slope is not None:
        others.mul_(slope)
    if shape.scale != 1:
        others.mul_(shape.scale)
    return loss, label_loss[:, 0], fusion_loss


@dataclass(frozen=True, slots=True)
class _Sums:
    """Σ exp(z − top) over the tokens without an entry; logarithms of Σ exp(z) over those, and over all. Each (n, 1)."""

    sum: torch.Tensor
    rest: torch.Tensor
    total: torch.Tensor

    @staticmethod
    def of(others: torch.Tensor, kept: torch.Tensor, top: torch.Tensor, width: int) -> "_Sums":
        """`others` (n, V) are exp(z − top), 0 where an entry is; `kept` (n, K) its logits."""
        within, beyond = (part.sum(-1, keepdim=True) for part in (others[:, :width], others[:, width:]))
        rest = top + within.log()
        total = torch.logaddexp(top + (within + beyond).log(), kept.logsumexp(-1, keepdim=True))
        return _Sums(within, rest, total)


def sparse_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    shape: Shape = Shape(),
    block: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ over positions of w·(λ·CE(label) + (1 − λ)·fusion), from hidden states and the output head's weights.

    Args:
        hidden_NH: hidden states at N positions, in the type that the matrix products shall use.
        weight_VH, bias_V: the output head's.
        targets: what to learn; float32 at least is used for all sums, those of gradients over blocks too.
        objective: the fusion term, with its missing mass, temperatures and label smoothing.
        shape: what becomes of the head's product before the softmax, and which of its rows are padding.
        block: positions whose logits exist at one time; None: as many as suit the device.

    Returns:
        The sum (scalar, differentiable once), and of each position (N,) the label's cross-entropy and the fusion term
        in nats, for the record: without weights and smoothing.
    """
    if block is None:
        block = max(16, (_GPU_CELLS if hidden_NH.is_cuda else _CPU_CELLS) // len(weight_VH))
    return _SparseCrossEntropy.apply(hidden_NH, weight_VH, bias_V, targets, objective, shape, block)  # type: ignore[no-any-return]
