"""Methods on thinned updates, against references that work element by element in float64."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion.merge import draws
from fusion.merge.methods import BLOCK, Block, InMemory, Merged, Part, get_method, joined
from fusion.merge.methods.magnitude import between, largest
from fusion.merge.methods.sparse import keys, numbers

FAMILY = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


def near(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """A base and models near it; a ninth of the elements has not moved, another one has moved by the same for all."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    models = [base + 1e-2 * torch.randn(shape, generator=generator) for _ in range(count)]
    for model in models:
        model.view(-1)[::9] = base.view(-1)[::9]
        model.view(-1)[4::9] = base.view(-1)[4::9] + 0.5**7
    return [tensor.to(dtype) for tensor in [base, *models]]


def start(name: str, base: Tensor, models: list[Tensor], seed: int = 0, **given: Any) -> tuple[InMemory, Merged]:
    inputs, method = InMemory(base, models, seed=seed), get_method(name)
    return inputs, method.merge(inputs, method.check(given, len(models)))


def run(name: str, base: Tensor, models: list[Tensor], seed: int = 0, **given: Any) -> Tensor:
    return joined(*start(name, base, models, seed, **given))


def parts(inputs: InMemory, merged: Merged) -> list[Part]:
    return inputs.map(merged.block, rows=merged.rows)


def flat_deltas(base: Tensor, models: list[Tensor]) -> np.ndarray:
    return np.stack([(model.double() - base.double()).flatten().numpy() for model in models])


def naive(
    base: Tensor,
    thinned: np.ndarray,
    weights: list[float],
    normalize: bool,
    scale: float = 1.0,
    election: str | None = None,
) -> tuple[Tensor, list[int], list[int]]:
    """The merge of thinned updates (K, n), and how many of each model were kept, and dropped for their sign.

    NaN where an election is a matter of rounding.
    """
    weighted = np.array(weights)[:, None] * thinned
    signs = np.sign(weighted)
    votes = (signs if election == "count" else weighted).sum(0)
    ours = signs == np.where(votes >= 0, 1, -1) if election else np.ones_like(signs, np.bool_)
    mass = np.where(ours, np.array(weights)[:, None], 0).sum(0) if normalize else np.ones_like(votes)
    update = np.divide(np.where(ours, weighted, 0).sum(0), mass, out=np.zeros_like(mass), where=mass != 0)
    if election == "sum":
        update[(votes != 0) & (np.abs(votes) < 1e-6 * np.abs(weighted).sum(0))] = np.nan
    merged = base.double().flatten() + scale * torch.from_numpy(update)
    return merged.view(base.shape), np.count_nonzero(thinned, 1).tolist(), ((signs != 0) & ~ours).sum(1).tolist()


def order_of(row: np.ndarray) -> np.ndarray:
    """Places in ascending order of |δ| as float32, equals by position."""
    return np.argsort(np.abs(row).astype(np.float32), kind="stable")


def keep_largest(row: np.ndarray, count: int) -> np.ndarray:
    """The row with all but the `count` largest 0, the first of equals staying."""
    places = np.lexsort((np.arange(row.size), -np.abs(row).astype(np.float32)))[:count]
    kept = np.zeros_like(row)
    kept[places] = row[places]
    return kept


def breadcrumbs_of(row: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Without the outliers at the end of the ascending order, then without the first until so many are left."""
    places, stay = order_of(row).tolist(), int(density * row.size)
    for _ in range(int(gamma * row.size)):
        if len(places) > stay:
            places.pop()
    places = places[len(places) - stay :]
    kept = np.zeros_like(row)
    kept[places] = row[places]
    return kept


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to the rounding of what blocks are worked in, but for what is NaN, which few are."""
    small, clear = 1e-12 if dtype == torch.float32 else 5e-7, ~expected.isnan()
    assert clear.sum() >= 0.999 * expected.numel()
    torch.testing.assert_close(found.double()[clear], expected[clear], rtol=small, atol=small)


def drawn_one_by_one(seed: int, name: str, model: int, place: int) -> int:
    """The 24 bits of a place, in Python's numbers: triple32 with the key's halves at its start and in its middle."""
    digest = hashlib.blake2b(f"{seed}\n{name}\n{model}".encode(), digest_size=8).digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    h = (place % 2**32) ^ low
    h = ((h ^ (h >> 17)) * 0xED5AD4BB) % 2**32
    h = ((h ^ (h >> 11)) + high + (place >> 32)) % 2**32
    h = (h * 0xAC4C1B51) % 2**32
    h = ((h ^ (h >> 15)) * 0x31848BAB) % 2**32
    return (h ^ (h >> 14)) >> 8


@pytest.mark.parametrize("first", [0, 12345, 2**32 - 700, 2**35 + 7])
def test_draws_are_those_of_the_formula_in_numba_and_in_torch(first: int) -> None:
    inputs = InMemory(torch.zeros(1), [torch.zeros(1)] * 3, name="a.weight", seed=5)
    own, count = keys(inputs), 1500
    expected = [[drawn_one_by_one(5, "a.weight", k, first + i) for i in range(count)] for k in range(3)]
    found = numbers(own, first, count, torch.device("cpu"))
    assert found.tolist() == expected
    for limit in (0, 1, 1 << 22, 1 << 24):
        kept = np.empty((3, count), np.bool_)
        draws.draw(first, own, np.full(3, limit, np.uint32), kept)
        assert (kept == (np.array(expected) < limit)).all()


def test_draws_are_even_and_independent() -> None:
    inputs = InMemory(torch.zeros(1), [torch.zeros(1)] * 2)
    x = numbers(keys(inputs), 0, 200_000, torch.device("cpu")).double() / 2**24
    assert torch.allclose(x.mean(1), torch.tensor([0.5, 0.5]).double(), atol=3e-3)
    counts = torch.histc(x.flatten(), 64, 0, 1)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 110  # χ² of 63 degrees: beyond it 1 in 4000
    apart = torch.stack([x[0, :-1], x[0, 1:], x[1, 1:]])  # neighbours, and the same place of another model
    assert (torch.corrcoef(apart) - torch.eye(3)).abs().max() < 0.01
    others = [InMemory(torch.zeros(1), [torch.zeros(1)], name="b"), InMemory(torch.zeros(1), [torch.zeros(1)], seed=1)]
    assert len({tuple(row) for rows in [inputs, *others] for row in keys(rows).tolist()}) == 4


@pytest.mark.parametrize("ties", ["first", "last"])
def test_largest_equals_a_stable_sort(ties: str) -> None:
    generator = torch.Generator().manual_seed(2)
    size = 2 * BLOCK + 77
    rows = [
        torch.randint(-25, 25, (size,), generator=generator) / 7,  # a few numbers, many in a block
        torch.randn(size, generator=generator),
        torch.where(torch.rand(size, generator=generator) < 0.7, 0.0, 1.0),
        1 + torch.randint(0, 900, (size,), generator=generator) * 2.0**-23,  # all in one bucket, equals in all blocks
    ]
    inputs = InMemory(torch.zeros(size), rows)
    wanted = [[0, 1, 5, 777], [size, size - 1, 3000, size // 2], [BLOCK, BLOCK + 1, size // 3, 2 * BLOCK], [1, 2, 0, 9]]
    for counts, cuts in zip(wanted, largest(inputs, wanted, ties), strict=True):
        found = np.concatenate(inputs.map(lambda block: between(block, cuts)), 1)  # noqa: B023
        for row, mask, count in zip(rows, found, counts, strict=True):
            tie = np.arange(size) * (1 if ties == "first" else -1)
            places = np.lexsort((tie, -row.abs().numpy()))[:count]
            expected = np.zeros(size, np.bool_)
            expected[places] = True
            moved = (row != 0).numpy()  # whether elements of 0 are taken makes no difference
            assert (mask[moved] == expected[moved]).all()


def test_ties_by_hand() -> None:
    """k = int(0.6 · 5) = 3. Trim: (4, −3, 2, ·, ·), (−1, ·, 2, ·, −3), (·, 3, 2, −1, ·): of ±1 the first ones stay."""
    base = torch.tensor([10.0, 20, 30, 40, 50])
    deltas = [[4.0, -3, 2, 1, -1], [-1.0, 1, 2, 0, -3], [0.5, 3, 2, -1, 1]]
    models = [base + torch.tensor(delta) for delta in deltas]
    inputs, merged = start("ties", base, models, density=0.6)
    # Signs: 4 − 1 +; −3 + 3 = 0, so +; +; −; −.
    assert joined(inputs, merged).tolist() == [14.0, 23.0, 32.0, 39.0, 47.0]
    (part,) = parts(inputs, merged)
    assert list(part.kept) == [3, 3, 3] and list(part.erased) == [1, 1, 0]
    assert merged.weights == pytest.approx([1 / 3] * 3)
    weighted = run("ties", base, models, density=0.6, weights=[1, 2, 3], scale=2.0)
    assert weighted.tolist() == [18.0, 26.0, 34.0, 38.0, 44.0]
    assert run("ties", base, models, density=0.6, normalize=False).tolist() == [14.0, 23.0, 36.0, 39.0, 47.0]
    # By count the signs come out the same; 4 − 1 − 1 is + by sum and − by count.
    assert run("ties", base, models, density=0.6, election="count").tolist() == [14.0, 23.0, 32.0, 39.0, 47.0]
    by_count = run("ties", base[:1], [base[:1] + x for x in (4.0, -1.0, -1.0)], density=1.0, election="count")
    assert by_count.tolist() == [9.0]
    assert run("ties", base[:1], [base[:1] + x for x in (4.0, -1.0, -1.0)], density=1.0).tolist() == [14.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("election", ["sum", "count"])
def test_ties_equals_float64(dtype: torch.dtype, election: str) -> None:
    base, *models = near(3, (BLOCK // 8 + 3, 11), dtype)  # two blocks
    deltas = flat_deltas(base, models)
    given = {"weights": [0.5, 2.0, 1.25], "density": [0.2, 0.7, 1.0], "election": election, "scale": 0.5}
    thinned = np.stack([keep_largest(row, int(d * row.size)) for row, d in zip(deltas, [0.2, 0.7, 1.0], strict=True)])
    for normalize in (True, False):
        expected, kept, erased = naive(base, thinned, [0.5, 2.0, 1.25], normalize, 0.5, election)
        inputs, merged = start("ties", base, models, normalize=normalize, **given)
        assert_near(joined(inputs, merged), expected, dtype)
        assert np.sum([part.kept for part in parts(inputs, merged)], axis=0).tolist() == kept
        assert np.sum([part.erased for part in parts(inputs, merged)], axis=0).tolist() == erased
    assert merged.weights == [0.25, 1.0, 0.625]


def test_a_negative_weight_votes_against_its_model() -> None:
    base, *models = near(3, (40, 30))
    weights = [1.0, -0.6, 0.3]
    for name in ("ties", "breadcrumbs_ties"):
        for normalize in (True, False):
            given = {"density": 1.0, "weights": weights, "normalize": normalize}
            expected, _, _ = naive(base, flat_deltas(base, models), weights, normalize, election="sum")
            assert_near(run(name, base, models, **given), expected, torch.float32)
    # 0.1 + 0.2 − 0.3 is not quite 0: it must not be what the update is divided by.
    up, down, zero = (torch.full((3,), x, dtype=torch.float32) for x in (1.0, -1.0, 0.0))
    merged = run("ties", zero, [up, up, down, up], weights=[0.1, 0.2, -0.3, 0.0], density=1.0, normalize=False)
    assert merged.tolist() == pytest.approx([0.6] * 3)
    merged = run("ties", zero, [up, up, down, zero], weights=[0.1, 0.2, -0.3, 1.0], density=1.0)
    assert merged.tolist() == pytest.approx([0.6] * 3)


def surveyed(name: str, tensors: dict[str, InMemory], given: dict[str, Any]) -> tuple[Any, Any]:
    """The parameters, and what the survey of all tensors comes to, as the engine asks for it."""
    method = get_method(name)
    parameters = method.check(given, next(iter(tensors.values())).models)
    state, more = None, method.surveys(parameters)
    while more:
        found = {key: method.module.survey(inputs, parameters, state) for key, inputs in tensors.items()}
        assert all(table.nbytes < 100_000 for table in found.values())
        state, more = method.module.conclude(parameters, state, found)
    return parameters, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_with_one_threshold_for_a_model(dtype: torch.dtype) -> None:
    """Whatever reaches the k-th largest of all tensors stays: all of equal ones, in large updates most."""
    shapes, factors = {"a": (BLOCK + 100,), "b": (31, 7), "c": (), "d": (0, 4)}, {"a": 1.0, "b": 20.0, "c": 1.0, "d": 1}
    tensors = {}
    for index, (key, shape) in enumerate(shapes.items()):
        base, *models = near(2, shape, seed=index)
        models = [base + factors[key] * (model - base) for model in models]
        tensors[key] = [tensor.to(dtype) for tensor in (base, *models)]
    everything = {key: flat_deltas(base, models) for key, (base, *models) in tensors.items()}
    whole = np.abs(np.concatenate(list(everything.values()), axis=1)).astype(np.float32)
    for densities in ([0.2, 0.01], [0.97, 1.0], [1e-6, 0.5]):
        inputs = {key: InMemory(base, models) for key, (base, *models) in tensors.items()}
        parameters, thresholds = surveyed("ties", inputs, {"trim": "model", "density": densities})
        counts = [int(density * whole.shape[1]) for density in densities]
        expected = [np.sort(row)[-count] if count else np.inf for row, count in zip(whole, counts, strict=True)]
        assert thresholds == expected
        for key, own in inputs.items():
            own.surveyed = thresholds
            deltas = everything[key]
            thinned = np.where(np.abs(deltas).astype(np.float32) >= np.array(expected)[:, None], deltas, 0)
            merged = get_method("ties").merge(own, parameters)
            reference, kept, _ = naive(tensors[key][0], thinned, [1.0, 1.0], True, election="sum")
            assert_near(joined(own, merged), reference, dtype)
            if reference.numel():
                assert np.sum([part.kept for part in parts(own, merged)], axis=0).tolist() == kept


def mask_of(inputs: InMemory, density: float) -> np.ndarray:
    """What chance keeps, (K, n)."""
    return (numbers(keys(inputs), 0, inputs.numel, torch.device("cpu")).double() / 2**24 < density).numpy()


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dare_equals_float64(name: str, dtype: torch.dtype) -> None:
    base, *models = near(3, (BLOCK // 8 + 3, 11), dtype)
    # Numbers that multiply without rounding, so that what cancels does so in float32 as well.
    deltas, weights = flat_deltas(base, models), [0.5, 0.25, 1.0]
    kept = mask_of(InMemory(base, models, seed=3), 0.25)
    assert abs(kept.mean() - 0.25) < 0.01
    election = "sum" if name == "dare_ties" else None
    norms = np.abs(deltas).sum(1) / np.abs(deltas * kept).sum(1)
    for rescale, factor in {"paper": 1 / 0.25, "none": 1.0, "norm": norms[:, None]}.items():
        expected, kept_counts, _ = naive(base, deltas * kept * factor, weights, False, 1.5, election)
        given = {"weights": weights, "density": 0.25, "rescale": rescale, "scale": 1.5}
        inputs, merged = start(name, base, models, 3, **given)
        assert_near(joined(inputs, merged), expected, dtype)
        assert np.sum([part.kept for part in parts(inputs, merged)], axis=0).tolist() == kept_counts
        assert merged.weights == [0.75, 0.375, 1.5]
    expected, _, erased = naive(base, deltas * kept / 0.25, weights, True, 1.0, election)
    inputs, merged = start(name, base, models, 3, weights=weights, density=0.25, normalize=True)
    if election:
        assert_near(joined(inputs, merged), expected, dtype)
        assert np.sum([part.erased for part in parts(inputs, merged)], axis=0).tolist() == erased
    else:
        total = base.double() + torch.from_numpy((np.array(weights) @ (deltas * kept / 0.25)) / 1.75).view(base.shape)
        assert_near(joined(inputs, merged), total, dtype)
        assert all(list(part.erased) == [] for part in parts(inputs, merged))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_dropped_is_made_up_for_in_the_mean(name: str) -> None:
    base, model = near(1, (5, 40))
    tensors = torch.stack([run(name, base, [model], seed=seed, density=0.5) for seed in range(400)])
    assert len({tuple(row.flatten().tolist()) for row in tensors}) == 400
    apart = (tensors.mean(0) - model.double()).abs()
    assert (apart <= 0.25 * (model - base).abs().double() + 1e-12).all()  # 5 of its deviations, 1 / √400 at most 1.4


def ranked(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """The probability of each element of a row, from its place in the ascending order."""
    p = np.empty(row.size)
    for rank, place in enumerate(order_of(row)):
        p[place] = density - epsilon + 2 * epsilon * rank / (row.size - 1) if row.size > 1 else density
    return p


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 896), torch.bfloat16),  # whole rows do not fill a block
        ((40, 896), torch.float32),
        ((3, BLOCK + 5), torch.bfloat16),  # a row is more than one
        ((1000,), torch.float32),
        ((9, 5, 8), torch.float32),
        ((50, 1), torch.float32),
        ((50, 2), torch.bfloat16),
    ],
)
def test_della_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, *models = near(2, shape, dtype)
    deltas, weights = flat_deltas(base, models), [1.0, 0.5]
    density, epsilon = [0.5, 0.7], [0.15, 0.29]
    row = shape[-1] if len(shape) > 1 else deltas.shape[1]
    p = np.stack(
        [
            np.concatenate([ranked(part, *those) for part in whole.reshape(-1, row)])
            for whole, those in zip(deltas, zip(density, epsilon, strict=True), strict=True)
        ]
    )
    drawn = numbers(keys(InMemory(base, models)), 0, deltas.shape[1], torch.device("cpu")).double().numpy() / 2**24
    kept = drawn < p
    norms = np.abs(deltas).sum(1) / np.maximum(np.abs(deltas * kept).sum(1), 1e-30)
    for rescale, factor in {"paper": 1 / p, "none": 1.0, "norm": norms[:, None]}.items():
        given = {"weights": weights, "density": density, "epsilon": epsilon, "rescale": rescale}
        expected, kept_counts, erased = naive(base, deltas * kept * factor, weights, True, 1.0, "sum")
        inputs, merged = start("della", base, models, **given)
        assert_near(joined(inputs, merged), expected, dtype)
        assert np.sum([part.kept for part in parts(inputs, merged)], axis=0).tolist() == kept_counts
        assert np.sum([part.erased for part in parts(inputs, merged)], axis=0).tolist() == erased
        expected, _, _ = naive(base, deltas * kept * factor, weights, False)
        assert_near(run("della_linear", base, models, **given), expected, dtype)


def test_ranks_of_any_bits_and_lengths() -> None:
    """What DELLA's sort leaves out of the bits it sorts by never decides: all widths, many equals, zeros."""
    generator = np.random.default_rng(0)
    for length in (1, 2, 3, 63, 64, 65, 900, 2500):
        for bits in (1, 2, 9, 17, 31):
            values = generator.integers(0, 2**bits, length, dtype=np.uint32) << np.uint32(
                generator.integers(0, 32 - bits)
            )
            keys_n = np.minimum(values, 0x7F7FFFFF).astype(np.uint32)
            keys_n[generator.random(length) < 0.1] = 0
            for own in (keys_n, np.zeros_like(keys_n), keys_n | np.uint32(1)):
                packed, spare = np.empty(length, np.uint64), np.empty(length, np.uint64)
                short, out, counts = (
                    np.empty(length, np.uint32),
                    np.empty(length, np.uint32),
                    np.empty((6, 2048), np.uint32),
                )
                draws._ranks(own, short, packed, spare, counts, out)
                assert out[np.argsort(own, kind="stable")].tolist() == list(range(length))


def test_breadcrumbs_by_hand() -> None:
    """Ten elements, gamma 0.2: 9 and 8 go. density 0.5: 7, 6, 5 and 4 stay, and of the two 3 the last one."""
    base = torch.zeros(10)
    model = torch.tensor([3.0, 9, -7, 3, 8, 1, 5, -4, 6, 2])
    inputs, merged = start("breadcrumbs", base, [model], density=0.5, gamma=0.2)
    assert joined(inputs, merged).tolist() == [0, 0, -7, 3, 0, 0, 5, -4, 6, 0]
    assert list(parts(inputs, merged)[0].kept) == [5] and merged.weights == [1.0]
    # Of equal outliers the last go first.
    assert run("breadcrumbs", base[:4], [torch.tensor([2.0, -2, 2, 1])], density=0.5, gamma=0.25).tolist() == [
        2,
        -2,
        0,
        0,
    ]
    # No outlier comes to an element: mergekit's slice would keep nothing.
    assert run("breadcrumbs", base, [model], density=0.5, gamma=0.09).tolist() == [0, 9, -7, 0, 8, 0, 5, 0, 6, 0]
    # With density 0.9 only one outlier can go.
    assert run("breadcrumbs", base, [model], density=0.9, gamma=0.5).tolist() == [3, 0, -7, 3, 8, 1, 5, -4, 6, 2]
    norm = run("breadcrumbs", base, [model], density=0.5, gamma=0.2, rescale="norm")
    assert norm.tolist() == pytest.approx([48 / 25 * x for x in (0, 0, -7, 3, 0, 0, 5, -4, 6, 0)])


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_breadcrumbs_equals_float64(name: str, dtype: torch.dtype) -> None:
    base, *models = near(3, (BLOCK // 8 + 3, 11), dtype)
    deltas, weights = flat_deltas(base, models), [0.5, 2.0, 1.25]
    shares = [(0.9, 0.01), (0.3, 0.1), (0.6, 0.7)]
    thinned = np.stack([breadcrumbs_of(row, *share) for row, share in zip(deltas, shares, strict=True)])
    densities, gammas = ([share[i] for share in shares] for i in (0, 1))
    election = "sum" if name == "breadcrumbs_ties" else None
    expected, kept, _ = naive(base, thinned, weights, False, 0.5, election)
    inputs, merged = start(name, base, models, density=densities, gamma=gammas, weights=weights, scale=0.5)
    assert_near(joined(inputs, merged), expected, dtype)
    assert np.sum([part.kept for part in parts(inputs, merged)], axis=0).tolist() == kept
    norms = np.abs(deltas).sum(1) / np.abs(thinned).sum(1)
    expected, _, _ = naive(base, thinned * norms[:, None], weights, False, 1.0, election)
    merged_norm = run(name, base, models, density=densities, gamma=gammas, weights=weights, rescale="norm")
    assert_near(merged_norm, expected, dtype)


@pytest.mark.parametrize("name", FAMILY)
def test_models_that_change_nothing_or_all_the_same(name: str) -> None:
    base, model = near(1, (BLOCK // 64, 70), torch.bfloat16)
    assert torch.equal(run(name, base, [base, base]).to(base.dtype), base)
    assert torch.equal(run(name, base, [model], density=1.0).to(base.dtype), model)
    assert torch.equal(run(name, base, [model] * 4, density=1.0, normalize=True).to(base.dtype), model)
    half = run(name, base, [model] * 2, density=1.0, normalize=True, scale=0.5)
    torch.testing.assert_close(half, (base.float() + model.float()) / 2)
    tiny = run(name, base[:1, 0], [model[:1, 0]], density=0.5, **({"gamma": 0.0} if "crumbs" in name else {}))
    assert tiny.shape == (1,) and tiny.isfinite().all()


@pytest.mark.parametrize("name", FAMILY)
def test_updates_of_any_size(name: str) -> None:
    """Updates of 1e-25 are updates: nothing is compared to a fixed number."""
    base, *models = near(2, (30, 40))
    large = run(name, torch.zeros_like(base), [model - base for model in models])
    small = run(name, torch.zeros_like(base), [(model - base) * 2.0**-80 for model in models])
    torch.testing.assert_close(small * 2.0**80, large)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_operators_come_to_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices run, on this one."""
    base, *models = near(3, (BLOCK // 16, 40), dtype)
    settings: list[dict[str, Any]] = [{}, {"rescale": "norm", "weights": [1.0, -0.4, 2.0], "normalize": True}]
    settings += [{"election": "count"}, {"trim": "model"}] if name == "ties" else []

    def both(given: dict[str, Any]) -> tuple[Tensor, list[Part]]:
        inputs = InMemory(base, models)
        parameters, inputs.surveyed = surveyed(name, {"weight": inputs}, {"density": 0.3, **given})
        merged = get_method(name).merge(inputs, parameters)
        return joined(inputs, merged), parts(inputs, merged)

    for given in settings:
        ours, there = both(given)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", False)
            theirs, also = both(given)
        assert_near(theirs, ours.double(), dtype)
        assert [list(part.kept) for part in there] == [list(part.kept) for part in also]
        assert [list(part.erased) for part in there] == [list(part.erased) for part in also]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("name", FAMILY)
def test_another_device_comes_to_the_same(name: str, device: str) -> None:
    base, *models = near(3, (BLOCK // 16, 40), torch.bfloat16)
    for given in ({}, {"rescale": "norm"}):
        there = run(name, base.to(device), [model.to(device) for model in models], density=0.3, **given)
        assert there.device.type == device
        torch.testing.assert_close(there.cpu(), run(name, base, models, density=0.3, **given))


def test_a_block_is_left_as_it_was() -> None:
    base, *models = near(2, (20, 30))
    for name in FAMILY:
        inputs, merged = start(name, base, models, rescale="norm")

        def work(block: Block, merged: Merged = merged) -> bool:
            before, deltas = block.values.clone(), block.deltas.clone()
            merged.block(block)
            return torch.equal(before, block.values) and torch.equal(deltas, block.deltas)

        assert all(inputs.map(work, rows=merged.rows))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ties", {"density": 0}, "ties: density = 0 must be a number in (0, 1] for all models, or a list"),
        ("ties", {"density": [0.5]}, "ties: density = [0.5] has 1 numbers for 2 models; give one for each"),
        ("ties", {"trim": "layer"}, "ties: trim = 'layer' must be one of tensor, model"),
        ("dare_ties", {"density": 1.5}, "dare_ties: density = 1.5 must be a number in (0, 1]"),
        ("dare_linear", {"rescale": True}, "dare_linear: rescale = True must be one of paper, norm, none"),
        ("della", {"density": 0.9}, "della: density = 0.9 with epsilon = 0.15 gives probabilities from 0.75 to 1.05"),
        ("della_linear", {"density": [0.5, 0.1], "epsilon": 0.1}, "gives probabilities from 0 to 0.2, which must lie"),
        ("della", {"epsilon": 0.5}, "della: epsilon = 0.5 must be a number in [0, 0.5)"),
        ("breadcrumbs", {"gamma": 1}, "breadcrumbs: gamma = 1 must be a number in [0, 1)"),
        ("breadcrumbs_ties", {"rescale": "paper"}, "breadcrumbs_ties: rescale = 'paper' must be one of none, norm"),
    ],
)
def test_bad_parameters_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        get_method(name).check(given, 2)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "della", "breadcrumbs_ties", "task_arithmetic"])
def test_a_tensor_that_no_model_is_to_change(name: str) -> None:
    """As mergekit has it: weights that sum to 0 are not divided by that."""
    base, *models = near(2, (40, 30))
    for weights in ([0.0, 0.0], [0, 0]):
        assert torch.equal(run(name, base, models, weights=weights, normalize=True).to(base.dtype), base)
    found = run("task_arithmetic", base, models, weights=[1.0, -1.0], normalize=True)
    assert torch.equal(found, run("task_arithmetic", base, models, weights=[1.0, -1.0], normalize=False))
