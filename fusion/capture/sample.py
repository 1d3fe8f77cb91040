"""A next-token distribution → the few entries that are kept. Batched, on any device; float32 whatever the logits are.

What is kept are exact entries with their true log-probabilities, draws that stand for the rest, or both. The token that
followed is always known exactly. `random` is Anshumann et al. 2025 (arXiv 2503.16870), "Sparse Logit Sampling".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of T distributions. Rows with fewer than K or D entries are filled up with id -1.

    Attributes:
        next_logp: float32 (T,), log-probability (nats) of the token that followed.
        ids: int64 (T, K), ids whose probability is known, most probable first.
        logp: float32 (T, K), their log-probabilities under the whole distribution: never renormalised.
        drawn: int64 (T, D), distinct ids that were drawn, ascending, those that are among `ids` too.
        counts: int64 (T, D), how often each was drawn.
        drawn_logp: float32 (T, D), their log-probabilities.
        proposal_logp: float32 (T, D), their log-probabilities under what they were drawn from.
    """

    next_logp: torch.Tensor
    ids: torch.Tensor
    logp: torch.Tensor
    drawn: torch.Tensor
    counts: torch.Tensor
    drawn_logp: torch.Tensor
    proposal_logp: torch.Tensor

    def left(self) -> torch.Tensor:
        """float32 (T,), the probability that the exact entries leave out: the mass that draws, if any, stand for."""
        return (1 - self.logp.exp().sum(-1)).clamp(0, 1)

    def estimate(self, draws: int) -> torch.Tensor:
        """float32 (T, D), an unbiased estimate of each drawn id's probability: count / draws times q / proposal."""
        weight = self.counts / draws * (self.drawn_logp - self.proposal_logp).exp()
        return torch.where(self.drawn >= 0, weight, 0.0)


def top_k(logits_TV: torch.Tensor, next_T: torch.Tensor, k: int) -> Kept:
    """The k most probable entries of each distribution.

    Args:
        logits_TV: logits of any float type.
        next_T: int64, the token that followed.
        k: entries kept, at most V.

    Raises:
        FloatingPointError: a row is not finite; its number is the error's first argument.
    """
    rows, total = _normalised(logits_TV)
    values, ids = _largest(rows, min(k, rows.shape[-1]))
    return _kept(rows, total, next_T, ids, values - total)


def nucleus(logits_TV: torch.Tensor, next_T: torch.Tensor, mass: float, k: int) -> Kept:
    """The fewest most probable entries whose probabilities reach `mass`, k at most; else as `top_k`."""
    rows, total = _normalised(logits_TV)
    values, ids = _largest(rows, min(k, rows.shape[-1]))
    logp = values - total
    before = logp.exp().cumsum(-1) - logp.exp()
    wanted = before < mass
    return _kept(rows, total, next_T, torch.where(wanted, ids, -1), logp.masked_fill(~wanted, -torch.inf))


def random(logits_TV: torch.Tensor, next_T: torch.Tensor, uniform_TN: torch.Tensor, temperature: float = 1.0) -> Kept:
    """N draws with replacement from softmax(temperature · logits), `uniform_TN` in [0, 1) saying which; see `uniforms`.

    `Kept.estimate` weighs them so that their expectation is softmax(logits), whatever the temperature.
    """
    return hybrid(logits_TV, next_T, 0, uniform_TN, temperature)


def hybrid(
    logits_TV: torch.Tensor, next_T: torch.Tensor, k: int, uniform_TN: torch.Tensor, temperature: float = 1.0
) -> Kept:
    """The k most probable entries as `top_k` has them, and draws from the whole distribution as `random` has them.

    Only draws beyond the k tell anything new: where the k hold nearly all of the mass there are few of these, so that
    the tail is paid for where there is one.
    """
    rows, total = _normalised(logits_TV)
    values, ids = _largest(rows, min(k, rows.shape[-1]))
    weight = (rows - rows.amax(-1, keepdim=True)).mul_(temperature).exp_()
    sums = weight.cumsum_(-1)
    # never the last place of all: that would be an id of no probability where the last ones have none
    at = uniform_TN.to(sums).clamp(max=1 - 2**-23) * sums[:, -1:]
    hits = torch.searchsorted(sums, at, right=True).clamp(max=rows.shape[-1] - 1).sort(-1).values
    drawn, counts = _counted(hits)
    known = drawn.clamp(min=0)
    logits = rows.gather(-1, known)
    # the proposal's sum once more where it is another: sums of tempered weights are relative to the largest logit
    of_all = total if temperature == 1 else sums[:, -1:].log() + temperature * rows.amax(-1, keepdim=True)
    kept = _kept(rows, total, next_T, ids, values - total)
    return Kept(kept.next_logp, kept.ids, kept.logp, drawn, counts, logits - total, temperature * logits - of_all)


def uniforms(sample: str, positions: np.ndarray, draws: int) -> np.ndarray:
    """float32 (T, draws) in [0, 1): the numbers that decide what is drawn at some positions of a sample.

    They depend on the sample's id and the position alone (numpy's Philox counters, keyed by the id), so that a
    capture gives the same on any number of ranks, in any order, on any device. Their steps of 2^-24 are the least
    probability that a draw tells apart.
    """
    key = int.from_bytes(hashlib.sha256(sample.encode()).digest()[:16], "little")
    width = -(-draws // 4) * 4  # a counter gives four numbers
    length = int(positions.max(initial=-1)) + 1
    raw = np.random.Philox(key=key).random_raw(length * width).reshape(length, width)[positions, :draws]
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def in_blocks(take: Callable[[slice], Kept], rows: int, block: int) -> Kept:
    """`take` of `block` rows after the other, as one.

    Raises:
        FloatingPointError: `take` raised it; the row is counted from the first of all.
    """
    parts = []
    for start in range(0, max(rows, 1), block):
        try:
            parts.append(take(slice(start, min(start + block, rows))))
        except FloatingPointError as error:
            raise FloatingPointError(start + error.args[0]) from None
    return joined(parts)


_BLANK = {"ids": -1, "drawn": -1, "counts": 0}


def joined(parts: list[Kept]) -> Kept:
    """Rows of several one after the other, filled up to the widest."""
    columns = [[getattr(part, f.name) for part in parts] for f in fields(Kept)]
    widest = [max(p.shape[-1] for p in column) if column[0].ndim > 1 else 0 for column in columns]
    blanks = [_BLANK.get(f.name, -torch.inf) for f in fields(Kept)]
    filled = [
        torch.cat([torch.nn.functional.pad(p, (0, w - p.shape[-1]), value=blank) if p.ndim > 1 else p for p in column])
        for column, w, blank in zip(columns, widest, blanks, strict=True)
    ]
    return Kept(*filled)


def _normalised(logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits, and the logarithm of the sum of their exponentials (T, 1)."""
    rows = logits_TV.float()
    total = rows.logsumexp(-1, keepdim=True)
    if not torch.isfinite(total).all():
        raise FloatingPointError(int((~torch.isfinite(total)).nonzero()[0, 0]))
    return rows, total


def _kept(rows: torch.Tensor, total: torch.Tensor, next_T: torch.Tensor, ids: torch.Tensor, logp: torch.Tensor) -> Kept:
    following = (rows.gather(-1, next_T[:, None]) - total)[:, 0]
    none, never = ids.new_zeros((len(rows), 0)), logp.new_zeros((len(rows), 0))
    return Kept(following, ids, logp, none, none, never, never)


def _largest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.topk(k)`, by way of the k stretches of each row whose largest values are largest: a sixth of the time."""
    size = 1 << max(int(np.log2(max(rows.shape[-1] / max(k, 1), 1)) / 2 + 0.5), 0)
    if k == 0 or size < 4:
        return rows.topk(k, dim=-1)
    room = -rows.shape[-1] % size
    padded = torch.nn.functional.pad(rows, (0, room), value=-torch.inf) if room else rows
    stretches = padded.view(len(rows), padded.shape[-1] // size, size)
    best = stretches.amax(-1).topk(k, dim=-1, sorted=False).indices
    values, at = stretches.gather(1, best[..., None].expand(-1, -1, size)).flatten(1).topk(k, dim=-1)
    ids = best.gather(-1, at // size) * size + at % size
    return values, ids.masked_fill(values == -torch.inf, -1)  # else it may be of the room after the last id


def _counted(hits_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted draws as distinct ids and how often each stands there, at the left of each row, -1 and 0 after them."""
    first = torch.ones_like(hits_TN, dtype=torch.bool)
    first[:, 1:] = hits_TN[:, 1:] != hits_TN[:, :-1]
    number = first.cumsum(-1) - 1  # of the id among the distinct ones of its row
    width = int(first.sum(-1).max()) if hits_TN.numel() else 0
    ids = torch.full_like(hits_TN[:, :width], -1).scatter_(-1, number, hits_TN)
    counts = torch.zeros_like(ids).scatter_add_(-1, number, torch.ones_like(hits_TN))
    return ids, counts
