"""OPCM, TSV-M, Iso-C and DOGE, against what their authors' codes do, in float64; and the decomposition they share."""

from typing import Any

import pytest
import torch
from merging import near
from torch import Tensor

from fusion.merge.methods import BLOCK, InMemory, Merged, get_method, joined
from fusion.merge.methods.spectral import polar, thin_svd

SHAPES = ((12, 9), (8, 8), (8, 11), (60, 6), (5, 41))
TYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-11, torch.bfloat16: 2e-6}  # blocks are float64, float32


def merge(
    method: str, base: Tensor, models: list[Tensor], layer: int | None = 0, surveyed: Any = None, **parameters: Any
) -> tuple[Tensor, Merged]:
    """A method on a tensor of a layer."""
    inputs = InMemory(base, models, layer=layer, surveyed=surveyed)
    chosen = get_method(method)
    merged = chosen.merge(inputs, chosen.check(parameters, len(models)))
    return joined(inputs, merged), merged


def survey(method: str, tensors: list[list[Tensor]], **parameters: Any) -> Any:
    """What a survey of several tensors of a layer comes to, as the engine asks for it."""
    module, checked = get_method(method).module, get_method(method).check(parameters, len(tensors[0]) - 1)
    assert module.surveys(checked)
    state, more = None, True
    while more:
        found = {}
        for number, (base, *models) in enumerate(tensors):
            found[str(number)] = module.survey(InMemory(base, models, layer=number), checked, state)
        state, more = module.conclude(checked, state, found)
    return state


def close(tensor: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal but for the rounding of the precision that this type is worked in."""
    assert tensor.dtype is (torch.float64 if dtype is torch.float32 else torch.float32)
    torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def updates(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    return [model.double() - base.double() for model in models]


def low_rank(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=dtype)
    return left @ torch.randn(rank, columns, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(30, 30), (40, 11), (11, 40), (200, 7), (7, 200), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thin_svd_equals_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = low_rank(*shape, min(shape), dtype)
    left, sigma, right = thin_svd(matrix)
    close_to = {"rtol": 0, "atol": 300 * torch.finfo(dtype).eps}
    assert left.shape == (shape[0], min(shape)) and right.shape == (min(shape), shape[1])
    torch.testing.assert_close(sigma, torch.linalg.svd(matrix).S, **close_to)
    torch.testing.assert_close((left * sigma) @ right, matrix, **close_to)
    torch.testing.assert_close(left.mT @ left, torch.eye(min(shape), dtype=dtype), **close_to)
    torch.testing.assert_close(right @ right.mT, torch.eye(min(shape), dtype=dtype), **close_to)


@pytest.mark.parametrize("shape", [(50, 50), (60, 40), (300, 30), (30, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_thin_svd_has_no_directions_that_are_not_there(
    shape: tuple[int, int], dtype: torch.dtype, rank: int, size: float
) -> None:
    matrix = size * low_rank(*shape, rank, dtype)
    left, sigma, right = thin_svd(matrix)
    assert len(sigma) == rank and left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    torch.testing.assert_close((left * sigma) @ right, matrix, rtol=0, atol=300 * torch.finfo(dtype).eps * size)
    torch.testing.assert_close(left.mT @ left, torch.eye(rank, dtype=dtype), rtol=0, atol=3e-6)


def test_thin_svd_of_nothing_and_the_nearest_orthonormal_matrix() -> None:
    assert [part.shape for part in thin_svd(torch.zeros(5, 0))] == [(5, 0), (0,), (0, 0)]
    assert torch.equal(polar(torch.zeros(4, 3)), torch.zeros(4, 3))
    assert torch.equal(polar(torch.zeros(4, 0)), torch.zeros(4, 0))
    # A stretched rotation is the rotation; one direction of two stays one direction.
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    torch.testing.assert_close(polar(rotation @ torch.diag(torch.tensor([5.0, 2.0]))), rotation)
    torch.testing.assert_close(
        polar(torch.tensor([[3.0, 3.0], [4.0, 4.0]])), torch.tensor([[0.6, 0.6], [0.8, 0.8]]) / 2**0.5
    )


def naive_opcm(tensors: list[list[Tensor]], alpha: float, matrices: list[bool]) -> list[Tensor]:
    """Model after model, scaled after each so that the merged update is as long as the models' mean."""
    deltas = [updates(base, models) for base, *models in tensors]
    lengths = [sum(float(delta[k].square().sum()) for delta in deltas) ** 0.5 for k in range(len(deltas[0]))]
    merged, before = [delta[0] for delta in deltas], 1.0
    for k in range(1, len(lengths)):
        for number, delta in enumerate(deltas):
            new = delta[k]
            if matrices[number]:
                u, s, vh = torch.linalg.svd(merged[number])
                inner = u.T @ new @ vh.T
                inner.diagonal().fill_(0)
                split = int((s.cumsum(0) / s.sum() > alpha).nonzero()[0])
                inner[:split, :split] = 0
                new = u @ inner @ vh
            merged[number] = before * merged[number] + new
        length = sum(float(each.square().sum()) for each in merged) ** 0.5
        mean = sum(lengths[: k + 1]) / (k + 1)
        merged, before = [each * mean / length for each in merged], length / mean
    return [base.double() + each for (base, *_), each in zip(tensors, merged, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_opcm_equals_the_naive_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = [near(4, shape, 1, dtype), near(4, (15,), 2, dtype), near(4, (6, 5), 3, dtype)]
    for alpha in (0.0, 0.5, 0.8):
        factor = survey("opcm", tensors, alpha=alpha)
        for (base, *models), expected in zip(tensors, naive_opcm(tensors, alpha, [True, False, True]), strict=True):
            tensor, merged = merge("opcm", base, models, alpha=alpha, surveyed=factor)
            close(tensor, expected, dtype)
            assert merged.weights == [factor] * 4
            (expected,) = naive_opcm([[base, *models]], alpha, [base.ndim == 2])
            close(merge("opcm", base, models, alpha=alpha, norm="tensor")[0], expected, dtype)


def test_opcm_by_hand() -> None:
    """What is there, 3 in one place and 1 in another, takes nothing in along its own directions."""
    first = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    second = torch.tensor([[5.0, 1.0, 2.0], [2.0, 7.0, 3.0]])
    # The diagonal goes; with α = 1 the first two rows and columns do, with 0.5 nothing but 3 / 4 > 0.5 does.
    for alpha, sums in ((0.5, [[3.0, 1.0, 2.0], [2.0, 1.0, 3.0]]), (1.0, [[3.0, 0.0, 2.0], [0.0, 1.0, 3.0]])):
        total = torch.tensor(sums, dtype=torch.float64)
        factor = (10**0.5 + 92**0.5) / 2 / float(total.norm())
        tensor, merged = merge("opcm", torch.zeros(2, 3), [first, second], alpha=alpha, norm="tensor")
        close(tensor, total * factor)
        assert merged.weights == pytest.approx([factor] * 2)
    # Of one direction there is one diagonal entry.
    flat = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    total = (flat + second - torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).double()
    close(merge("opcm", torch.zeros(2, 3), [flat, second])[0], total * (3 + 92**0.5) / 2 / float(total.norm()))
    # Outside of layers, and where it is no matrix, updates are added up.
    for layer, shape in ((None, (2, 3)), (0, (6,)), (0, (1, 2, 3))):
        models = [tensor.view(shape) for tensor in (first, second)]
        tensor, _ = merge("opcm", torch.zeros(shape), models, layer)
        total = (first + second).double()
        close(tensor, total.view(shape) * (10**0.5 + 92**0.5) / 2 / float(total.norm()))
    tensor, _ = merge("opcm", torch.zeros(2, 3), [first, second], None, outside="project")
    assert torch.equal(tensor, merge("opcm", torch.zeros(2, 3), [first, second])[0])


def test_opcm_of_equals() -> None:
    base, model = near(1, (9, 6))
    assert torch.equal(merge("opcm", base, [model])[0].float(), model)
    torch.testing.assert_close(merge("opcm", base, [model] * 3)[0], model.double(), rtol=0, atol=1e-14)
    assert torch.equal(merge("opcm", base, [base] * 3)[0], base.double())
    # Nothing is there to project off, and the mean length is half of the only update's.
    torch.testing.assert_close(merge("opcm", base, [base, model])[0], (base.double() + model.double()) / 2)
    assert merge("opcm", torch.zeros(0, 4), [torch.zeros(0, 4)] * 2)[0].shape == (0, 4)


def naive_tsv(deltas: list[Tensor]) -> Tensor:
    rank, count = min(deltas[0].shape), len(deltas)
    kept = rank // count
    lefts, rights = torch.zeros(deltas[0].shape[0], rank).double(), torch.zeros(rank, deltas[0].shape[1]).double()
    values = torch.zeros(rank).double()
    for k, delta in enumerate(deltas):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        place = slice(k * kept, (k + 1) * kept)
        lefts[:, place], values[place], rights[place] = u[:, :kept], s[:kept], vh[:kept]
    (p, _, q), (r, _, t) = (torch.linalg.svd(part, full_matrices=False) for part in (lefts, rights))
    return p @ q @ torch.diag(values) @ r @ t


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_tsv_m_equals_the_naive_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, *models = near(3, shape, 4, dtype)
    deltas = updates(base, models)
    close(merge("tsv_m", base, models)[0], base.double() + naive_tsv(deltas), dtype)
    weights = [0.5, 1.0, -2.0]
    expected = base.double() + 0.8 * naive_tsv([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    tensor, merged = merge("tsv_m", base, models, weights=weights, scale=0.8)
    close(tensor, expected, dtype)
    assert merged.weights == pytest.approx([0.4, 0.8, -1.6])
    two = merge("tsv_m", base, models[:2], share=0.5)[0]
    assert len(thin_svd(two - base.to(two.dtype))[1]) >= min(shape) // 4 * 2


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_tsv_m_of_equals_and_of_models_that_do_not_meet() -> None:
    base, model = near(1, (12, 10), seed=5)
    (delta,) = updates(base, [model])
    close(merge("tsv_m", base, [model])[0], model.double())
    close(merge("tsv_m", base, [model] * 3)[0], base.double() + truncated(delta, 3))
    close(merge("tsv_m", base, [model] * 2, share=0.6)[0], base.double() + truncated(delta, 3))
    close(merge("tsv_m", base, [model] * 20)[0], base.double() + truncated(delta, 1))  # one direction each at least
    assert torch.equal(merge("tsv_m", base, [base] * 2)[0], base.double())
    # One that did not move leaves the other the directions it may have.
    close(merge("tsv_m", base, [base, model])[0], base.double() + truncated(delta, 5))
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[:3, :3], second[3:6, 4:8] = torch.randn(3, 3), torch.randn(3, 4)
    close(merge("tsv_m", torch.zeros(8, 8), [first, second])[0], (first + second).double())


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_what_is_no_matrix_of_a_layer_is_averaged(method: str) -> None:
    for layer, shape in ((None, (9, 6)), (3, (2 * BLOCK + 5,)), (3, (4, 3, 5)), (3, ())):
        base, *models = near(2, shape or (1,), seed=6)
        base, models = base.view(shape), [model.view(shape) for model in models]
        deltas = updates(base, models)
        tensor, merged = merge(method, base, models, layer, weights=[1.0, 3.0], scale=0.5)
        close(tensor, base.double() + 0.25 * deltas[0] + 0.75 * deltas[1])
        assert merged.weights == [0.25, 0.75]
    base, *models = near(2, (9, 6), seed=6)
    inside, outside = (merge(method, base, models, layer, outside="merge")[0] for layer in (0, None))
    assert torch.equal(inside, outside)
    assert merge(method, torch.zeros(4, 0), [torch.zeros(4, 0)] * 2)[0].shape == (4, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_iso_c_equals_the_naive_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, *models = near(3, shape, 7, dtype)
    weights = torch.tensor([1.0, 0.5, 2.0]).double()[:, None, None]
    u, s, vh = torch.linalg.svd((weights * torch.stack(updates(base, models))).sum(0), full_matrices=False)
    expected = base.double() + 0.7 * u @ torch.diag(s.mean().expand(len(s))) @ vh
    tensor, merged = merge("iso_c", base, models, weights=[1.0, 0.5, 2.0], scale=0.7)
    close(tensor, expected, dtype)
    assert merged.weights == pytest.approx([0.7, 0.35, 1.4])
    torch.testing.assert_close(torch.linalg.svdvals(expected - base.double()), (0.7 * s.mean()).expand(len(s)))


def test_iso_c_of_equals() -> None:
    base, model = near(1, (10, 8))
    (delta,) = updates(base, [model])
    thrice = torch.linalg.svdvals(merge("iso_c", base, [model] * 3)[0] - base.double())
    torch.testing.assert_close(thrice, (3 * torch.linalg.svdvals(delta).mean()).expand(8))
    assert torch.equal(merge("iso_c", base, [base, base])[0], base.double())
    opposite = base.double() - delta
    assert torch.equal(merge("iso_c", base.double(), [base + delta, opposite])[0].float(), base)
    # Of two directions only these are made as strong as their mean.
    flat = torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0]))
    close(merge("iso_c", torch.zeros(4, 4), [flat])[0], torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0]).double()))


def naive_doge(
    base: Tensor, models: list[Tensor], masks: list[Tensor], share: float, iterations: int, rate: float, eta: float
) -> Tensor:
    """Through autograd and torch's Adam."""
    deltas = updates(base, models)
    rank, count = min(base.shape), len(deltas)
    factors = [eta / float(delta.norm()) for delta in deltas]
    lefts = [torch.linalg.svd(delta, full_matrices=False)[0][:, : rank // count] for delta in deltas]
    shared = torch.linalg.svd(torch.cat(lefts, 1))[0][:, : int(rank * share)]
    shift = torch.zeros_like(deltas[0], requires_grad=True)
    adam = torch.optim.Adam([shift], lr=rate)
    for _ in range(iterations):
        adam.zero_grad()
        merged = sum(factor * (delta + shift) for factor, delta in zip(factors, deltas, strict=True))
        sum((delta * (delta - merged)).sum(1).square().sum() for delta in deltas).backward()
        assert shift.grad is not None
        shift.grad -= shared @ shared.T @ shift.grad
        adam.step()
    parts = zip(factors, deltas, masks, strict=True)
    return base.double() + sum(factor * (delta + shift.detach()) * mask for factor, delta, mask in parts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [0, 1, 25])
def test_doge_equals_the_naive_reference(shape: tuple[int, int], iterations: int) -> None:
    base, *models = near(3, shape, 8)
    models[1] = base + 40 * (models[1] - base)
    wanted = int(0.4 * base.numel())
    masks = [
        delta.abs() >= delta.abs().flatten().sort(descending=True)[0][wanted - 1] for delta in updates(base, models)
    ]
    assert {int(mask.sum()) for mask in masks} == {wanted}  # no ties, which the tensor's own trim decides by place
    chosen: dict[str, Any] = {"share": 0.25, "iterations": iterations, "eta": 0.2}
    expected = naive_doge(base, models, masks, rate=1e-3, **chosen)
    tensor, merged = merge("doge", base, models, learning_rate=1e-3, density=0.4, trim="tensor", **chosen)
    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-9)
    lengths = [float(delta.norm()) for delta in updates(base, models)]
    assert merged.weights == pytest.approx([0.2 / length for length in lengths])
    (part,) = InMemory(base, models).map(merged.block)
    assert list(part.kept) == [wanted] * 3
    assert torch.equal(tensor, merge("doge", base, models, learning_rate=1e-3, density=0.4, **chosen)[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_doge_trims_over_the_whole_model(density: float, dtype: torch.dtype) -> None:
    tensors = [near(2, (300, 170), 9, dtype), near(2, (40, 30), 10, dtype), near(2, (8,), 11, dtype)]
    tensors[1][1:] = [tensors[1][0] + 10 * (model - tensors[1][0]) for model in tensors[1][1:]]
    state = survey("doge", tensors, density=density)
    flat = [torch.cat([updates(base, models)[k].flatten() for base, *models in tensors[:2]]).abs() for k in (0, 1)]
    wanted = int(density * (300 * 170 + 40 * 30))
    limits = [float(each.float().sort(descending=True)[0][wanted - 1]) if wanted else float("inf") for each in flat]
    assert state.thresholds == tuple(limits)
    for base, *models in tensors[:2]:
        masks = [delta.abs().float() >= limit for delta, limit in zip(updates(base, models), limits, strict=True)]
        expected = naive_doge(base, models, masks, 1 / 6, 0, 0.0, 0.07)
        tensor, _ = merge("doge", base, models, surveyed=state, density=density, iterations=0)
        close(tensor, expected, dtype)


def test_doge_of_what_did_not_move() -> None:
    base, model = near(1, (9, 12))
    tensor, merged = merge("doge", base, [base, base], iterations=3)
    assert torch.equal(tensor, base.double()) and merged.weights == [0, 0]
    tensor, merged = merge("doge", base, [base, model], iterations=3)
    assert merged.weights[0] == 0 and torch.isfinite(tensor).all() and not torch.equal(tensor, base.double())
    close(
        merge("doge", base, [model], iterations=0, density=1.0, eta=float((model.double() - base).norm()))[0],
        model.double(),
    )


def test_doge_leaves_what_is_no_matrix_of_a_layer_at_the_base() -> None:
    for layer, shape in ((None, (9, 6)), (3, (70,)), (3, (4, 3, 5)), (2, (0, 3))):
        base, *models = near(2, shape, seed=6)
        tensor, merged = merge("doge", base, models, layer)
        assert torch.equal(tensor, base.double()) and merged.weights == [0, 0]
        tensor, merged = merge("doge", base, models, layer, others="average")
        close(tensor, (models[0].double() + models[1].double()) / 2)
    assert survey("doge", [near(2, (5,))]) is None


@pytest.mark.parametrize("method", ["opcm", "tsv_m", "iso_c", "doge"])
def test_matrices_over_several_blocks(method: str) -> None:
    base, *models = near(2, (1500, 360), seed=12, dtype=torch.bfloat16)
    assert base.numel() > 2 * BLOCK
    chosen: dict[str, Any] = {"iterations": 2} if method == "doge" else {}
    tensor, _ = merge(method, base, models, **chosen)
    wide = merge(method, base.float(), [model.float() for model in models], **chosen)[0]
    torch.testing.assert_close(tensor.double(), wide, rtol=0, atol=1e-5)
    module = get_method(method).module
    assert module.scratch_bytes(2, 8) == module.scratch_bytes(16, 8) == 2 * module.scratch_bytes(2, 4)
