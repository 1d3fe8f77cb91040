"""SCE, linear, task arithmetic and what all methods share: selection, election, parameters."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from merging import near, run
from torch import Tensor

from fusion.merge import kernels
from fusion.merge.methods import BLOCK, InMemory, get_method, method_names
from fusion.merge.methods.election import _elect, divided, elect
from fusion.merge.methods.gram import gram
from fusion.merge.methods.sce import spread
from fusion.merge.methods.select import masks, top

DEFINITIONS = ("paper", "fuseai", "mergekit")


def naive_sce(base: Tensor, models: list[Tensor], tau: float, definition: str) -> tuple[Tensor, list[float]]:
    """DESIGN.md's words, element by element, in Python's numbers."""
    origin = base.double().flatten().tolist()
    deltas = [[m - o for m, o in zip(model.double().flatten().tolist(), origin, strict=True)] for model in models]
    count, size = len(models), len(origin)
    columns = [[Fraction(deltas[k][i]) for k in range(count)] for i in range(size)]
    means = [sum(column) / count for column in columns]
    # In fractions, so that what ties in truth ties here.
    variances = [sum((d - mean) ** 2 for d in column) for column, mean in zip(columns, means, strict=True)]
    selected = set(range(size))
    if tau < 1:
        wanted = int(tau * sum(variance > 0 for variance in variances))
        selected = set(sorted(range(size), key=lambda i: (-variances[i], i))[:wanted])
    filtered = [[value if i in selected else 0.0 for i, value in enumerate(delta)] for delta in deltas]
    energies = [sum(value**2 for value in delta) for delta in filtered]
    weights = [energy / sum(energies) if sum(energies) else 1 / count for energy in energies]
    used = deltas if definition == "fuseai" else filtered
    merged = []
    for i in range(size):
        sign = 1 if sum(used[k][i] for k in range(count)) >= 0 else -1
        alive = [k for k in range(count) if used[k][i] * sign > 0]
        update = sum(weights[k] * used[k][i] for k in alive)
        if definition != "paper" and sum(weights[k] for k in alive) > 0:
            update /= sum(weights[k] for k in alive)
        merged.append(origin[i] + update)
    return torch.tensor(merged, dtype=torch.float64).view(base.shape), weights


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("tau", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sce_equals_the_naive_reference(definition: str, tau: float, dtype: torch.dtype) -> None:
    base, *models = near(3, (13, 29), dtype=dtype)
    expected, weights = naive_sce(base, models, tau, definition)
    tensor, merged = run("sce", base, models, tau=tau, definition=definition)
    assert tensor.dtype is (torch.float64 if dtype is torch.float32 else torch.float32) and tensor.shape == base.shape
    torch.testing.assert_close(tensor.double(), expected, rtol=1e-12 if dtype is torch.float32 else 1e-6, atol=1e-12)
    assert merged.weights == pytest.approx(weights, rel=1e-12 if dtype is torch.float32 else 1e-6)


def test_sce_by_hand() -> None:
    """Variances 4, 9, 0.25, 0 and 1: τ = 0.5 selects int(0.5 × 4) = 2, the second and the first."""
    base = torch.zeros(5)
    models = [torch.tensor([1.0, 4.0, 0.5, 2.0, 0.0]), torch.tensor([-3.0, -2.0, 1.5, 2.0, 2.0])]
    # Selected energies 1 + 16 = 17 and 9 + 4 = 13; signs of the sums: −, +.
    a, b = 17 / 30, 13 / 30
    tensor, merged = run("sce", base, models, tau=0.5, definition="paper")
    assert merged.weights == pytest.approx([a, b])
    torch.testing.assert_close(tensor, torch.tensor([-3 * b, 4 * a, 0, 0, 0]).double())
    part = merged.block(next(iter(InMemory(base, models).map(lambda block: block))))
    assert list(part.kept) == [2, 2] and list(part.erased) == [1, 1]
    tensor, _ = run("sce", base, models, tau=0.5, definition="mergekit")
    torch.testing.assert_close(tensor, torch.tensor([-3.0, 4.0, 0, 0, 0]).double())
    # All deltas count here; the last element of the first model, 0, has no sign and takes no part.
    tensor, _ = run("sce", base, models, tau=0.5, definition="fuseai")
    torch.testing.assert_close(tensor, torch.tensor([-3.0, 4.0, 0.5 * a + 1.5 * b, 2.0, 2.0]).double())


def test_sce_sums_of_zero_count_as_plus_and_ties_go_to_the_first() -> None:
    models = [torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0, -1.0])]
    tensor, merged = run("sce", torch.zeros(4), models, tau=0.75)
    assert merged.weights == [0.5, 0.5]
    assert tensor.tolist() == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_sce_of_equals(definition: str) -> None:
    base, model = near(1, (11, 17))
    assert torch.equal(run("sce", base, [model] * 3, tau=1.0, definition=definition)[0].float(), model)
    tensor, alone = run("sce", base, [model], tau=0.1, definition=definition)
    assert torch.equal(tensor.float(), model) and alone.weights == [1.0]
    # Equal models do not vary: the filter leaves nothing, and only `fuseai` merges what it did not select.
    tensor, same = run("sce", base, [model] * 3, tau=0.5, definition=definition)
    assert torch.equal(tensor.float(), model if definition == "fuseai" else base)
    assert same.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_sce_without_updates_is_the_base(definition: str, tau: float) -> None:
    base = near(0, (8, 9))[0]
    tensor, merged = run("sce", base, [base, base], tau=tau, definition=definition)
    assert torch.equal(tensor.float(), base) and merged.weights == [0.5, 0.5]


def test_sce_weights_do_not_depend_on_the_size_of_the_updates() -> None:
    """Updates of 1e-25 are still updates: mergekit's threshold would make their weights uniform."""
    deltas = [torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 0.0, 1.0])]
    large, merged = run("sce", torch.zeros(3), deltas, tau=0.7, definition="mergekit")
    small, tiny = run("sce", torch.zeros(3), [1e-25 * delta for delta in deltas], tau=0.7, definition="mergekit")
    assert merged.weights == pytest.approx([13 / 14, 1 / 14]) and tiny.weights == pytest.approx(merged.weights)
    torch.testing.assert_close(small, 1e-25 * large, rtol=1e-6, atol=0)


def test_linear_and_task_arithmetic_equal_float64() -> None:
    base, *models = near(3, (7, 31))
    weights = [0.5, 2.0, -0.75]
    wide = torch.stack(models).double()
    factors = torch.tensor(weights, dtype=torch.float64)[:, None, None]

    tensor, merged = run("linear", None, models)
    torch.testing.assert_close(tensor, wide.mean(0), rtol=1e-14, atol=0)
    assert merged.weights == pytest.approx([1 / 3] * 3)
    tensor, merged = run("linear", None, models, weights=weights)
    torch.testing.assert_close(tensor, (factors * wide).sum(0) / 1.75, rtol=1e-12, atol=1e-15)
    assert merged.weights == pytest.approx([weight / 1.75 for weight in weights])
    tensor, _ = run("linear", None, models, weights=weights, normalize=False)
    torch.testing.assert_close(tensor, (factors * wide).sum(0), rtol=1e-12, atol=1e-15)
    assert torch.equal(run("linear", None, [models[0]] * 3)[0].float(), models[0])

    moved = (factors * (wide - base.double())).sum(0)
    tensor, merged = run("task_arithmetic", base, models, weights=weights, scale=0.5)
    torch.testing.assert_close(tensor, base.double() + 0.5 * moved, rtol=1e-12, atol=0)
    assert merged.weights == [0.25, 1.0, -0.375]
    tensor, _ = run("task_arithmetic", base, models, weights=weights, normalize=True)
    torch.testing.assert_close(tensor, base.double() + moved / 1.75, rtol=1e-12, atol=0)
    assert run("task_arithmetic", base, models)[1].weights == [1.0, 1.0, 1.0]
    assert torch.equal(run("task_arithmetic", base, [models[0]])[0].float(), models[0])
    assert torch.equal(run("task_arithmetic", base, [base, base])[0].float(), base)


@pytest.mark.parametrize("name", method_names())
def test_odd_shapes_pass_and_equals_come_back_where_they_must(name: str) -> None:
    """A scalar, one element, and a tensor of none, through every method with what it needs."""
    method = get_method(name)
    count = getattr(method.module, "MODELS", 2)
    given: dict[str, object] = {"metrics": [1.0] * count} if name == "metrics" else {}
    if name == "layer_swap":
        given = {"bottom": 1, "top": 0, "transition": 0}
    for shape in [(), (1,), (0, 3), (3, 0)]:
        ones = torch.ones(shape)
        statistics = [ones] * count if method.statistics == "element" else []
        inputs = InMemory(ones, [ones] * count, statistics, layers=1, layer=0)
        parameters = method.check(given, count)
        state, more = None, method.surveys(parameters)
        while more:
            found = {"weight": method.module.survey(inputs, parameters, state)}
            state, more = method.module.conclude(parameters, state, found)
        inputs.surveyed = state
        merged = method.merge(inputs, parameters)
        parts = inputs.map(lambda block: torch.as_tensor(merged.block(block).values), rows=merged.rows)  # noqa: B023
        tensor = torch.cat(parts) if parts else torch.empty(0)
        assert tensor.numel() == ones.numel() and torch.isfinite(tensor).all()
        assert len(merged.weights) == count


@pytest.mark.parametrize("ties", ["first", "last"])
def test_selection_equals_a_stable_sort(ties: str) -> None:
    generator = torch.Generator().manual_seed(2)
    size = 2 * BLOCK + 77
    rows = [torch.randint(0, 50, (size,), generator=generator) / 7, torch.randn(size, generator=generator).abs()]
    inputs = InMemory(None, rows)
    for counts in [(0, 1), (1, 0), (777, size // 2), (size - 1, size)]:
        cuts = top(inputs, lambda block: block.models.float(), 2, counts, ties=ties)
        found = torch.cat(inputs.map(lambda block: masks(cuts, block.models.float(), block.start)), 1)  # noqa: B023
        for row, mask, count in zip(rows, found, counts, strict=True):
            order = np.lexsort((np.arange(size) * (1 if ties == "first" else -1), -row.numpy()))
            assert mask.nonzero().squeeze(1).tolist() == sorted(order[:count].tolist())
    moved = []
    top(inputs, lambda block: block.models.float(), 2, lambda found: moved.append(found) or 5)
    assert moved == [int(row.count_nonzero()) for row in rows]


@pytest.mark.parametrize("by_count", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_election_compiled_equals_torch(by_count: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-2, 3, (4, 3000), generator=generator).to(dtype)
    votes, weights = [1.0, 0.5, 2.0, -1.0], [0.1, 0.2, 0.3, 0.4]
    total, mass, dropped = elect(values, votes, weights, by_count)
    expected = _elect(values, votes, weights, by_count)
    torch.testing.assert_close(total, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mass, expected[1], rtol=1e-6, atol=1e-6)
    assert dropped == expected[2] and sum(dropped) > 0
    assert divided(torch.tensor([2.0, 3.0]), torch.tensor([4.0, 0.0])).tolist() == [0.5, 3.0]


def test_spread_and_account() -> None:
    _, *models = near(5, (3000,))
    rows = torch.stack(models).double()
    torch.testing.assert_close(spread(rows), rows.std(0, unbiased=False).float(), rtol=1e-6, atol=1e-12)
    assert not spread(rows[:1].expand(4, -1).contiguous()).any()
    base = np.array([7.0, 0, 1, 2, -3])
    deltas = np.array([[1.0, 0, -1, 0, 2], [0, 0, 1, -3, 1]])
    gram = np.empty((2, 2))
    assert kernels.account(np.stack([base, *(base + deltas)]), gram) == (4, 1)
    assert gram.tolist() == [[6.0, 1.0], [1.0, 11.0]]


def test_gram() -> None:
    base, *models = near(3, (BLOCK + 9,))
    rows = torch.stack(models).double()
    torch.testing.assert_close(gram(InMemory(None, models), "models"), rows @ rows.T)
    deltas = rows - base.double()
    torch.testing.assert_close(gram(InMemory(base, models)), deltas @ deltas.T)


@pytest.mark.parametrize(
    ("method", "parameters", "line"),
    [
        ("sce", {"topk": 0.1}, "sce: unknown parameter topk = 0.1; it takes tau, definition"),
        ("sce", {"tau": 0}, "sce: tau = 0 must be a number in (0, 1]"),
        ("sce", {"tau": 1.5}, "sce: tau = 1.5 must be a number in (0, 1]"),
        ("sce", {"tau": "0.1"}, "sce: tau = '0.1' must be a number in (0, 1]"),
        ("sce", {"tau": True}, "sce: tau = True must be a number in (0, 1]"),
        ("sce", {"tau": float("nan")}, "sce: tau = nan must be a number in (0, 1]"),
        ("sce", {"definition": "best"}, "sce: definition = 'best' must be one of paper, fuseai, mergekit"),
        ("linear", {"normalize": 1}, "linear: normalize = 1 must be true or false"),
        ("linear", {"weights": [1, "x"]}, "linear: weights = [1, 'x'] must be a finite number for all models, or a"),
        ("linear", {"weights": [1.0]}, "linear: weights = [1.0] has 1 numbers for 2 models; give one for each"),
        ("linear", {"weights": [1, -1]}, "linear: weights = [1.0, -1.0] sum to 0 and cannot be normalized"),
        ("task_arithmetic", {"scale": float("inf")}, "task_arithmetic: scale = inf must be a finite number"),
    ],
)
def test_parameters_are_refused_by_name(method: str, parameters: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        get_method(method).check(parameters, 2)


def test_an_unknown_method_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        ValueError, match="unknown merge method 'best'; known are linear, task_arithmetic, metrics, sce"
    ):
        get_method("best")
