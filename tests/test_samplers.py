"""Samplers: what is kept of a distribution, against naive references; draws, against the law they must follow."""

from dataclasses import fields
from hashlib import sha256

import numpy as np
import pytest
import torch
from scipy import stats

from fusion.capture.sample import Kept, hybrid, in_blocks, joined, nucleus, random, top_k, uniforms

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))
DEVICES = ["cpu", GPU]
# V and k: stretches of 1, 2, 4 … ids, whole and not; fewer ids than are asked for
SIZES = [(1, 1), (2, 5), (7, 3), (50, 50), (97, 1), (101, 2), (513, 8), (1000, 7), (1023, 64), (4099, 65), (50257, 64)]
SAMPLERS = ("top_k", "nucleus", "random", "hybrid")


def logits_of(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def numbers(rows: int, draws: int, name: str = "0123456789abcdef") -> torch.Tensor:
    return torch.from_numpy(uniforms(name, np.arange(rows), draws))


def keep(sampler: str, logits: torch.Tensor, following: torch.Tensor, uniform: torch.Tensor, k: int = 5) -> Kept:
    if sampler == "top_k":
        return top_k(logits, following, k)
    if sampler == "nucleus":
        return nucleus(logits, following, 0.7, k)
    if sampler == "random":
        return random(logits, following, uniform, 0.7)
    return hybrid(logits, following, k, uniform, 1.3)


def same(one: Kept, other: Kept) -> bool:
    """Equal wherever there is an entry."""
    entries = [torch.equal(getattr(one, n), getattr(other, n)) for n in ("next_logp", "ids", "logp", "drawn")]
    stands = one.drawn >= 0
    weights = ("counts", "drawn_logp", "proposal_logp")
    return all(entries) and all(torch.equal(getattr(one, n)[stands], getattr(other, n)[stands]) for n in weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocabulary", "k"), SIZES)
def test_top_k_is_topk_of_the_log_softmax(vocabulary: int, k: int, device: str) -> None:
    logits = logits_of(6, vocabulary, seed=vocabulary).to(device)
    following = torch.arange(6, device=device) % vocabulary
    before = logits.clone()
    kept = top_k(logits, following, k)
    logp = logits.double().log_softmax(-1)
    wanted = logp.topk(min(k, vocabulary))
    assert torch.equal(kept.ids, wanted.indices)
    assert torch.allclose(kept.logp.double(), wanted.values, rtol=1e-6, atol=2e-6)
    assert torch.allclose(kept.next_logp.double(), logp[range(6), following], rtol=1e-6, atol=2e-6)
    assert kept.logp.dtype == kept.next_logp.dtype == torch.float32
    assert all(getattr(kept, n).shape == (6, 0) for n in ("drawn", "counts", "drawn_logp", "proposal_logp"))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("vocabulary", "k"), SIZES)
def test_top_k_of_ties_keeps_distinct_ids_of_the_largest_values(vocabulary: int, k: int) -> None:
    logits = torch.randint(-3, 2, (8, vocabulary), generator=torch.Generator().manual_seed(1)).float()
    logits[0] = 0
    kept = top_k(logits, torch.zeros(8, dtype=torch.long), k)
    logp = logits.log_softmax(-1)
    assert torch.allclose(kept.logp, logp.topk(min(k, vocabulary)).values, atol=2e-6)
    assert torch.allclose(kept.logp, logp.gather(-1, kept.ids), atol=2e-6)
    assert all(len(set(row)) == min(k, vocabulary) for row in kept.ids.tolist())


def test_top_k_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.125, 0.375], [0.25, 0.5, 0.25]])
    kept = top_k(probs.log() + 7, torch.tensor([1, 0]), 2)
    assert kept.ids[0].tolist() == [0, 2] and kept.ids[1, 0] == 1
    assert torch.allclose(kept.logp.exp(), torch.tensor([[0.5, 0.375], [0.5, 0.25]]))
    assert torch.allclose(kept.next_logp.exp(), torch.tensor([0.125, 0.25]))
    assert torch.allclose(kept.left(), torch.tensor([0.125, 0.25]))


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = nucleus(logits, torch.zeros(3, dtype=torch.long), 0.7, 3)
    assert kept.ids[0].tolist() == [1, 3, -1] and kept.ids[1].tolist() == [0, -1, -1]
    assert sorted(kept.ids[2].tolist())[0] >= 0  # 0.75 takes three of four
    assert torch.allclose(kept.logp[0].exp(), torch.tensor([0.5, 0.25, 0.0]))
    assert torch.allclose(kept.left(), torch.tensor([0.25, 0.03, 0.25]), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("k", [1, 9, 64, 1000])
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(mass: float, k: int, device: str) -> None:
    logits = logits_of(40, 300, seed=2) * torch.linspace(0.1, 2, 40)[:, None]
    kept = nucleus(logits.to(device), torch.zeros(40, dtype=torch.long, device=device), mass, k)
    probs = logits.double().softmax(-1)
    for t in range(40):
        wanted: list[int] = []
        total = 0.0
        for i in probs[t].argsort(descending=True).tolist():
            if total >= mass or len(wanted) == k:
                break
            wanted.append(i)
            total += float(probs[t, i])
        assert [i for i in kept.ids[t].tolist() if i >= 0] == wanted
        assert float(kept.logp[t].exp().sum()) == pytest.approx(total, abs=2e-6)
        assert (kept.logp[t, len(wanted) :] == -torch.inf).all() and (kept.ids[t, len(wanted) :] == -1).all()


def naive_draws(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> list[dict[int, int]]:
    """How often the inverse of each row's distribution function gives which id."""
    found = []
    for row, wanted in zip((temperature * logits.double()).softmax(-1).numpy(), uniform.double().numpy(), strict=True):
        ids, counts = np.unique(np.searchsorted(np.cumsum(row), wanted, side="right"), return_counts=True)
        found.append(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("sampler", ["random", "hybrid"])
def test_draws_invert_the_distribution_function(sampler: str, temperature: float, device: str) -> None:
    logits, uniform, following = logits_of(50, 70, seed=3), numbers(50, 33), torch.arange(50)
    at = (logits.to(device), following.to(device))
    k, number = 6, uniform.to(device)
    kept = random(*at, number, temperature) if sampler == "random" else hybrid(*at, k, number, temperature)
    for row, counts, wanted in zip(
        kept.drawn.tolist(), kept.counts.tolist(), naive_draws(logits, uniform, temperature), strict=True
    ):
        assert {i: c for i, c in zip(row, counts, strict=True) if i >= 0} == wanted
        width = len(wanted)
        assert row[:width] == sorted(row[:width]) and row[width:] == [-1] * (len(row) - width)
        assert sum(counts) == 33
    stands = kept.drawn.cpu() >= 0
    assert stands.any(0).all()  # no wider than it must be
    ids = kept.drawn.cpu().clamp(min=0)
    logp, proposal = logits.log_softmax(-1), (temperature * logits).log_softmax(-1)
    assert torch.allclose(kept.drawn_logp.cpu()[stands], logp.gather(-1, ids)[stands], atol=1e-5)
    assert torch.allclose(kept.proposal_logp.cpu()[stands], proposal.gather(-1, ids)[stands], atol=1e-5)
    assert torch.allclose(kept.next_logp.cpu(), logp[range(50), following], atol=1e-5)
    if sampler == "hybrid":
        exact = top_k(*at, k)
        assert torch.equal(kept.ids, exact.ids) and torch.equal(kept.logp, exact.logp)
        naive = 1 - logits.double().softmax(-1).topk(k).values.sum(-1)
        assert torch.allclose(kept.left().cpu().double(), naive, atol=2e-6)
        alone = random(*at, number, temperature)
        assert torch.equal(kept.drawn, alone.drawn) and torch.equal(kept.counts, alone.counts)
        assert torch.equal(kept.estimate(33), alone.estimate(33))
    else:
        assert kept.ids.shape == kept.logp.shape == (50, 0) and (kept.left() == 1).all()


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    """The numbers of one position of 2,000 samples, 24 draws each."""
    at = np.array([7])
    return torch.from_numpy(np.concatenate([uniforms(f"{n:016x}", at, 24) for n in range(2000)]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_mean_over_many_samples_is_the_distribution(many: torch.Tensor, temperature: float, device: str) -> None:
    """Of 48,000 draws, none of 30 ids is beyond 4.5 standard deviations: by chance once in 5,000 such tests."""
    logits = logits_of(1, 30, seed=4, spread=0.7)
    logits[0, [0, 17, 29]] = -torch.inf
    rows = logits.expand(2000, -1).to(device)
    kept = random(rows, torch.ones(2000, dtype=torch.long, device=device), many.to(device), temperature)
    ids, weights = kept.drawn.cpu(), kept.estimate(24).cpu().double()
    sums = torch.zeros(2000, 31, dtype=torch.float64).scatter_add_(-1, ids % 31, weights)[:, :30]  # -1 goes to 30
    q, proposal = logits[0].double().softmax(-1), (temperature * logits[0].double()).softmax(-1)
    some = q > 0
    variance = q[some] ** 2 / proposal[some] - q[some] ** 2  # of one draw's weight
    assert (48_000 * proposal[some]).min() > 100  # a normal law fits
    z = (sums.mean(0) - q)[some] / (variance / 48_000).sqrt()
    assert z.abs().max() < 4.5
    assert (sums[:, ~some] == 0).all() and not torch.isin(ids, torch.tensor([0, 17, 29])).any()
    # neither is the spread less or more than that of independent draws: 24 of one sample do not hang together
    assert torch.allclose(sums[:, some].var(0), variance / 24, rtol=0.2)
    if temperature == 1:
        assert torch.allclose(sums.sum(-1), torch.ones(2000, dtype=torch.float64))
    counts = torch.zeros(31, dtype=torch.long).scatter_add_(0, (ids % 31).flatten(), kept.counts.cpu().flatten())[:30]
    assert counts.sum() == 48_000
    assert stats.chisquare(counts[some].numpy(), 48_000 * proposal[some].numpy()).pvalue > 1e-4


def test_numbers_are_even_and_apart_from_each_other(many: torch.Tensor) -> None:
    values = many.numpy()
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    counts = np.bincount((values.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4
    along = uniforms("ab", np.arange(4000), 12)
    assert stats.chisquare(np.bincount((along.ravel() * 64).astype(int), minlength=64)).pvalue > 1e-4
    pairs = [(along[:-1, 0], along[1:, 0]), (along[:, 0], along[:, 1]), (values[:-1, 0], values[1:, 0])]
    for one, other in pairs:  # positions, draws, samples
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(one))
    assert len(np.unique(along)) > 0.99 * along.size


def test_numbers_depend_on_sample_and_position_alone() -> None:
    whole = uniforms("00ff00ff00ff00ff", np.arange(40), 10)
    for positions in ([3], [0, 39], [39, 5, 5], list(range(20, 30))):
        assert np.array_equal(uniforms("00ff00ff00ff00ff", np.array(positions), 10), whole[positions])
    assert not np.array_equal(uniforms("00ff00ff00ff00fe", np.arange(40), 10), whole)
    assert uniforms("a", np.array([], dtype=int), 10).shape == (0, 10)
    # as another would count them: a counter gives four numbers, three counters hold ten
    key = int.from_bytes(sha256(b"00ff00ff00ff00ff").digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=3 * 17).random_raw(10)
    assert (whole[17] == (raw // 2**40) / 2**24).all()


def test_numbers_stay_what_they_were() -> None:
    """A cache that goes on with another version of numpy goes on with the same draws."""
    found = uniforms("0123456789abcdef", np.array([0, 1000]), 3) * 2**24
    assert found.astype(int).tolist() == [[13717142, 16528641, 97547], [4483805, 9653538, 13227137]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_is_kept_the_same_in_any_company(sampler: str) -> None:
    logits, following, uniform = logits_of(37, 211, seed=5), torch.arange(37), numbers(37, 20)
    whole = keep(sampler, logits, following, uniform)
    for block in (1, 5, 36, 37, 100):
        parts = in_blocks(lambda s: keep(sampler, logits[s], following[s], uniform[s]), 37, block)
        assert same(whole, parts)
    backwards = keep(sampler, logits.flip(0), following.flip(0), uniform.flip(0))
    assert same(whole, Kept(*(getattr(backwards, f.name).flip(0) for f in fields(Kept))))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_kept_as_their_floats(sampler: str, dtype: torch.dtype) -> None:
    logits, following, uniform = logits_of(9, 301, seed=6).to(dtype), torch.arange(9), numbers(9, 20)
    kept = keep(sampler, logits, following, uniform)
    assert same(keep(sampler, logits.float(), following, uniform), kept)
    for f in fields(Kept):
        assert getattr(kept, f.name).dtype == (torch.float32 if f.name.endswith("logp") else torch.int64)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_told_by_its_number(sampler: str, value: float) -> None:
    logits, following, uniform = logits_of(12, 20), torch.zeros(12, dtype=torch.long), numbers(12, 8)
    logits[7, 3] = value
    logits[9] = -torch.inf  # no id at all
    for take, first in ((slice(0, 12), 7), (slice(8, 12), 1), (slice(7, 8), 0)):
        with pytest.raises(FloatingPointError) as told:
            keep(sampler, logits[take], following[take], uniform[take])
        assert told.value.args == (first,)
    for block in (1, 4, 5, 12):
        with pytest.raises(FloatingPointError) as told:
            in_blocks(lambda s: keep(sampler, logits[s], following[s], uniform[s]), 12, block)
        assert told.value.args == (7,)
    assert len(keep(sampler, logits[:7], following[:7], uniform[:7]).next_logp) == 7


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_kept_of_nothing(sampler: str) -> None:
    def take(rows: slice) -> Kept:
        return keep(sampler, torch.zeros(0, 9)[rows], torch.zeros(0, dtype=torch.long), torch.zeros(0, 8))

    for kept in (take(slice(0, 0)), in_blocks(take, 0, 5), joined([take(slice(0, 0))] * 2)):
        assert kept.next_logp.shape == (0,)
        assert kept.ids.shape == kept.logp.shape == (0, 0 if sampler == "random" else 5)
        assert kept.drawn.shape == kept.counts.shape == kept.estimate(8).shape == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_an_id_of_no_probability_is_never_drawn(temperature: float, device: str) -> None:
    logits = torch.full((4, 40), -torch.inf)
    logits[0, 20], logits[1, [3, 30]], logits[2, 39], logits[3, 0] = 5.0, 0.0, -2.0, 1e4
    ends = torch.tensor([[0.0, 2**-24, 0.5, 1 - 2**-24]]).expand(4, -1)
    kept = random(logits.to(device), torch.tensor([20, 3, 39, 0], device=device), ends.to(device), temperature)
    assert kept.drawn.tolist() == [[20, -1], [3, 30], [39, -1], [0, -1]]
    assert kept.counts.tolist() == [[4, 0], [2, 2], [4, 0], [4, 0]]
    assert torch.allclose(kept.estimate(4).cpu(), torch.tensor([[1.0, 0], [0.5, 0.5], [1, 0], [1, 0]]), atol=1e-6)
    assert torch.allclose(kept.next_logp.exp().cpu(), torch.tensor([1, 0.5, 1, 1]))


def test_probabilities_that_lie_far_apart_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4 + 1]])
    for how in SAMPLERS:
        kept = keep(how, logits, torch.tensor([1, 0]), numbers(2, 16), k=2)
        assert kept.next_logp.tolist() == pytest.approx([-1e4, -float(np.log(2 + np.e))], abs=1e-3)  # float32 at 1e4
        assert torch.isfinite(kept.estimate(16)).all() and torch.isfinite(kept.left()).all()


def test_ids_of_no_probability_are_ids_all_the_same() -> None:
    logits = torch.full((3, 1001), -torch.inf)
    logits[:, :10] = logits_of(3, 10)
    kept = top_k(logits, torch.zeros(3, dtype=torch.long), 64)
    assert torch.isfinite(kept.logp[:, :10]).all() and (kept.logp[:, 10:] == -torch.inf).all()
    assert kept.ids.max() < 1001


def test_rows_that_are_filled_up_hold_no_draws_and_no_mass() -> None:
    logits, following, uniform = logits_of(20, 60, seed=8), torch.arange(20), numbers(20, 9)
    kept = in_blocks(lambda s: random(logits[s], following[s], uniform[s]), 20, 1)
    assert (kept.drawn < 0).any() and (kept.counts.sum(-1) == 9).all()
    few, more = (top_k(logits[:2], following[:2], k) for k in (2, 5))
    assert torch.allclose(joined([few, more]).left(), torch.cat([few.left(), more.left()]))


def test_nothing_is_kept_of_nothing_of_many_ids() -> None:
    kept = top_k(torch.zeros(0, 900), torch.zeros(0, dtype=torch.long), 4)
    assert kept.ids.shape == (0, 4)
