"""A next-token distribution → the few entries that are kept, with their true log-probabilities."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of T distributions.

    Attributes:
        ids: int64 (T, K), the kept token ids, most probable first.
        logp: float32 (T, K), their log-probabilities in nats under the whole distribution: never renormalised.
        next_logp: float32 (T,), the log-probability of the token that followed.
    """

    ids: torch.Tensor
    logp: torch.Tensor
    next_logp: torch.Tensor


def top_k(logits_TV: torch.Tensor, next_T: torch.Tensor, k: int, block: int = 1024) -> Kept:
    """The k most probable entries of each distribution.

    Args:
        logits_TV: logits of any float type; they are turned to float32 `block` rows at a time, never as a whole.
        next_T: int64, the token that followed.
        k: entries kept, at most V.

    Raises:
        FloatingPointError: a row is not finite; its number is the error's first argument.
    """
    k = min(k, logits_TV.shape[-1])
    parts = []
    for start in range(0, len(logits_TV), block):
        rows = logits_TV[start : start + block].float()
        total = rows.logsumexp(-1, keepdim=True)
        if not torch.isfinite(total).all():
            raise FloatingPointError(start + int((~torch.isfinite(total)).nonzero()[0, 0]))
        values, ids = rows.topk(k, dim=-1)
        following = rows.gather(-1, next_T[start : start + block, None])
        parts.append((ids, values - total, (following - total)[:, 0]))
    if not parts:
        empty = logits_TV.new_zeros((0, k), dtype=torch.float32)
        return Kept(empty.long(), empty, empty[:, 0])
    ids, logp, next_logp = (torch.cat(column) for column in zip(*parts, strict=True))
    return Kept(ids, logp, next_logp)
