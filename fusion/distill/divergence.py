"""How far a student is from a teacher, over the ids that the teacher's entries name and one bucket for all others.

Each measure is a function of the student's probabilities q of these classes alone, so that its gradient in the V logits
follows from one number a class, q·∂f/∂q: no (positions × V) work is done here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Divergence = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd"]
MissingMass = Literal["ghost", "drop", "renormalise"]
_LEAST = 1e-4  # the least mass that a bucket counts as having, where a logarithm of it is taken


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be made small.

    Attributes:
        divergence: `cross_entropy` of the student under the teacher; `forward_kl`, the same less the teacher's entropy:
            one gradient; `reverse_kl`, KL(student ‖ teacher) (Gu et al. 2306.08543); `jsd`, the generalised
            Jensen-Shannon divergence β·KL(teacher ‖ m) + (1 − β)·KL(student ‖ m), m = β·teacher + (1 − β)·student
            (Agarwal et al. 2306.13649).
        missing: what the teacher's entries lack. `drop`: it is left away, a row's mass scales its loss; `renormalise`:
            entries are scaled up to sum to 1; `ghost`: it is compared, as one entry, with all that the student gives
            to ids without an entry.
        teacher_temperature: entries become p^(1/T), with their sum as it was: the tail that is missing has no shape.
        student_temperature: of the student's logits in the fusion term, which is multiplied by its square
            (Hinton et al. 1503.02531) so that gradients keep their size.
        beta: of `jsd`.
        label_smoothing: share of the label's mass that goes to all ids of the vocabulary alike.
    """

    divergence: Divergence = "cross_entropy"
    missing: MissingMass = "ghost"
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    beta: float = 0.5
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A divergence at n positions, and q·∂f/∂q of each class.

    Attributes:
        value: (n,), nats.
        kept: (n, K), of the entries; 0 in places that are not used.
        rest: (n, 1), of the bucket.
    """

    value: torch.Tensor
    kept: torch.Tensor
    rest: torch.Tensor


def measure(
    probs_NK: torch.Tensor, logq_NK: torch.Tensor, logq_rest_N1: torch.Tensor, objective: Objective
) -> Measured:
    """The divergence of a student from a teacher's entries.

    `cross_entropy` and `forward_kl` are exact for the teacher that `missing` says. `reverse_kl` and `jsd` with `ghost`
    are those of the two distributions in which all ids without an entry are one: never more than between the whole
    distributions. A bucket's mass counts as 1e-4 at least in `reverse_kl`. With `renormalise` both compare
    the student within the entries' ids, renormalised there too: what it gives to others is free. `drop` is not defined
    for them: the student would do best to leave the entries.

    Args:
        probs_NK: the teacher's probabilities, 0 in places that are not used; a row sums to at most 1.
        logq_NK: the student's log-probabilities of the same ids; anything where not used.
        logq_rest_N1: the student's log-probability of all other ids together, -inf where there are none.
    """
    used = probs_NK > 0
    probs = _tempered(probs_NK, objective.teacher_temperature)
    logq = logq_NK.masked_fill(~used, 0.0)
    if objective.missing == "renormalise":
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
    if objective.missing == "ghost":
        # where the entries are the whole vocabulary nothing is outside, and nothing is missing either
        open_ = torch.isfinite(logq_rest_N1)
        left = torch.where(open_, (1 - probs.sum(-1, keepdim=True)).clamp_min(0), 0)
    else:
        open_ = torch.zeros_like(logq_rest_N1, dtype=torch.bool)
        left = torch.zeros_like(logq_rest_N1)
    outside = logq_rest_N1.masked_fill(~open_, 0.0)
    if objective.divergence in ("cross_entropy", "forward_kl"):
        value = -(probs * logq).sum(-1) - (left * outside)[:, 0]
        if objective.divergence == "forward_kl":
            value = value + torch.special.xlogy(probs, probs).sum(-1) + torch.special.xlogy(left, left)[:, 0]
        return Measured(value, -probs, -left)
    assert objective.missing != "drop", "config refuses it"
    compare: _Comparison = _reverse_kl if objective.divergence == "reverse_kl" else _jsd
    if objective.missing == "ghost":
        value, slope = compare(probs, logq, used, objective.beta)
        least = _LEAST if objective.divergence == "reverse_kl" else 0.0
        value_rest, slope_rest = compare(left.clamp_min(least), outside, open_, objective.beta)
        return Measured(value + value_rest, logq.exp() * slope, outside.exp() * slope_rest)
    within = logq - logq.masked_fill(~used, float("-inf")).logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    value, slope = compare(probs, within, used, objective.beta)
    q = within.exp().masked_fill(~used, 0.0)
    return Measured(value, q * (slope - (q * slope).sum(-1, keepdim=True)), left)


_Comparison = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]  # p, log q, which count, beta → Σ (n,), ∂/∂q (n, classes)


def _reverse_kl(
    p: torch.Tensor, logq: torch.Tensor, counts: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = (logq - torch.where(counts, p, 1).log()).masked_fill(~counts, 0.0)
    return (logq.exp() * ratio).sum(-1), (ratio + 1).masked_fill(~counts, 0.0)


def _jsd(p: torch.Tensor, logq: torch.Tensor, counts: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    q = logq.exp()
    logm = torch.logaddexp(p.log() + _log(beta), logq + _log(1 - beta))
    slope = (1 - beta) * (logq - logm).masked_fill(~counts, 0.0)
    value = beta * (torch.special.xlogy(p, p) - p * logm.masked_fill(~counts, 0.0)) + q * slope
    return value.sum(-1), slope


def _log(share: float) -> float:
    return float(torch.tensor(share, dtype=torch.float64).log())


def _tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    if temperature == 1:
        return probs
    mass = probs.sum(-1, keepdim=True)
    shaped = probs / probs.amax(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
    shaped = torch.where(probs > 0, shaped.pow(1 / temperature), 0)
    return shaped * (mass / shaped.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny))
