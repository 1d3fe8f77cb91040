"""The fused sparse cross-entropy against dense logits, dense targets and autograd."""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from fusion.distill.divergence import MissingMass, Objective
from fusion.distill.loss import Shape, Targets, sparse_cross_entropy

MODES: tuple[MissingMass, ...] = get_args(MissingMass)
N, V, H, K = 7, 23, 5, 6


def make_targets(n: int = N, v: int = V, k: int = K, weight: float | None = None, seed: int = 0) -> Targets:
    """Rows with all places used, some, and none; a row that is not used has probability 0 at id 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)]) if n else torch.zeros(0, k).long()
    probs = torch.rand(n, k, generator=generator, dtype=torch.float64) + 0.05
    probs = 0.9 * probs / probs.sum(-1, keepdim=True)
    for row in range(0, n, 3):
        probs[row, row % k :], ids[row, row % k :] = 0, 0
    label_weight = torch.rand(n, generator=generator, dtype=torch.float64)
    if weight is not None:
        label_weight.fill_(weight)
    labels = torch.randint(v, (n,), generator=generator)
    return Targets(labels, ids, probs, label_weight)


def make_head(
    n: int = N, v: int = V, h: int = H, seed: int = 1, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, h), (v, h), (v,)] if bias else [(n, h), (v, h)]
    made = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    return made[0], made[1], made[2] if bias else None


def naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    missing: MissingMass = "ghost",
    objective: Objective | None = None,
    shape: Shape = Shape(),  # noqa: B008
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row from the definitions: whole logits, whole distributions, autograd."""
    objective = objective or Objective(missing=missing)
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * (logits / shape.softcap).tanh()
    width = shape.vocabulary or logits.shape[1]
    student = logits.log_softmax(-1)
    total, label, fusion = logits.new_zeros(()), [], []
    for row in range(len(hidden)):
        label.append(-student[row, targets.labels[row]])
        fusion.append(naive_fusion(logits[row] / objective.student_temperature, targets, row, objective, width))
        eps = objective.label_smoothing
        smooth = (1 - eps) * label[-1] - eps * student[row, :width].mean()
        share = targets.label_weight[row].to(logits.dtype)
        scale = 1.0 if targets.weight is None else targets.weight[row]
        total = total + scale * (share * smooth + (1 - share) * fusion[-1])
    if not label:
        return hidden.sum() * 0, hidden.sum(-1), hidden.sum(-1)
    return total, torch.stack(label), torch.stack(fusion)


def naive_fusion(logits: Tensor, targets: Targets, row: int, objective: Objective, width: int) -> Tensor:
    kept = {int(i): float(p) for i, p in zip(targets.ids[row], targets.probs[row], strict=True) if p > 0}
    mass, rest = sum(kept.values()), [i for i in range(width) if i not in kept]
    shaped = {i: p ** (1 / objective.teacher_temperature) for i, p in kept.items()}
    kept = {i: p * mass / sum(shaped.values()) for i, p in shaped.items()}
    if objective.missing == "renormalise":
        kept = {i: p / mass for i, p in kept.items()}
    q = logits.softmax(-1)
    teacher, classes = list(kept.values()), [q[i] for i in kept]
    if objective.divergence in ("reverse_kl", "jsd") and objective.missing == "renormalise" and kept:
        classes = [c / sum(classes) for c in classes]
    if objective.missing == "ghost" and rest:
        teacher.append(max(1 - mass, 0.0))
        classes.append(q[rest].sum())
    loss, beta = logits.new_zeros(()), objective.beta
    bucket = len(teacher) - 1 if objective.missing == "ghost" and rest else -1
    for n, (p, c) in enumerate(zip(teacher, classes, strict=True)):
        p = torch.tensor(p, dtype=logits.dtype)
        if objective.divergence == "cross_entropy":
            loss = loss - p * c.log()
        elif objective.divergence == "forward_kl":
            loss = loss - p * c.log() + torch.special.xlogy(p, p)
        elif objective.divergence == "reverse_kl":
            loss = loss + c * (c.log() - (p.clamp_min(1e-4) if n == bucket else p).log())
        else:
            m = beta * p + (1 - beta) * c
            loss = loss + beta * (torch.special.xlogy(p, p) - p * m.log()) + (1 - beta) * c * (c.log() - m.log())
    return objective.student_temperature**2 * loss


def gradients(total: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None]))


@pytest.mark.parametrize(("missing", "bias", "weight"), list(product(MODES, (True, False), (None, 0.0, 0.5, 1.0))))
def test_value_and_gradients(missing: MissingMass, bias: bool, weight: float | None) -> None:
    head, targets = make_head(bias=bias), make_targets(weight=weight)
    expected, found = naive(*head, targets, missing), sparse_cross_entropy(*head, targets, Objective(missing=missing))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert not found[1].requires_grad and not found[2].requires_grad
    for a, b in zip(gradients(3 * expected[0], *head), gradients(3 * found[0], *head), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", MODES)
def test_by_hand(missing: MissingMass) -> None:
    hidden = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)  # uniform over 4 ids
    targets = Targets(
        torch.tensor([3]), torch.tensor([[1, 0, 0]]), torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([0.25])
    )
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    total, label, fusion = sparse_cross_entropy(
        hidden, torch.zeros(4, 1).double(), bias, targets, Objective(missing=missing)
    )
    ln2 = torch.tensor(2.0).double().log().item()
    teacher = {"drop": ln2, "renormalise": 2 * ln2, "ghost": ln2 + 0.5 * (4 / 3 * torch.ones(())).log().item()}[missing]
    assert label.item() == pytest.approx(2 * ln2) and fusion.item() == pytest.approx(teacher, rel=1e-6)
    assert total.item() == pytest.approx(0.25 * 2 * ln2 + 0.75 * teacher, rel=1e-6)
    own = {"drop": [1, -3, 1, 1], "renormalise": [2, -6, 2, 2], "ghost": [2 / 3, -2, 2 / 3, 2 / 3]}[missing]
    expected = 0.25 * torch.tensor([1, 1, 1, -3]) / 4 + 0.75 * torch.tensor(own) / 8
    torch.testing.assert_close(gradients(total, bias)[0], expected.double())


@pytest.mark.parametrize("missing", MODES)
def test_gradcheck(missing: MissingMass) -> None:
    head, targets = make_head(n=4, v=9, h=3), make_targets(n=4, v=9, k=4)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_cross_entropy(hidden, weight, bias, targets, Objective(missing=missing), block=3)[0]

    assert torch.autograd.gradcheck(loss, [leaf for leaf in head if leaf is not None])


@pytest.mark.parametrize("missing", MODES)
@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_blocks_equal_the_whole(missing: MissingMass, block: int) -> None:
    head, targets = make_head(), make_targets()
    whole, parts = (sparse_cross_entropy(*head, targets, Objective(missing=missing), block=size) for size in (N, block))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-14, atol=1e-14)
    for a, b in zip(gradients(whole[0], *head), gradients(parts[0], *head), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("missing", MODES)
def test_float32_and_bfloat16_stay_near(missing: MissingMass) -> None:
    targets = make_targets()
    exact = make_head()
    # the same numbers, as bfloat16 has them, in every type
    rounded = [t.detach().bfloat16() for t in exact if t is not None]
    reference = [t.double().requires_grad_() for t in rounded]
    expected = naive(reference[0], reference[1], reference[2], targets, missing)
    wanted = gradients(expected[0], *reference)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        head = [t.to(dtype).requires_grad_() for t in rounded]
        total, label, fusion = sparse_cross_entropy(
            head[0], head[1], head[2], targets, Objective(missing=missing), block=3
        )
        assert total.dtype == label.dtype == fusion.dtype == torch.float32
        assert abs(total.item() - expected[0].item()) <= bound * abs(expected[0].item())
        torch.testing.assert_close(label.double(), expected[1].detach(), rtol=bound, atol=2 * bound)
        for a, b, leaf in zip(wanted, gradients(total, *head), head, strict=True):
            assert b.dtype == leaf.dtype
            assert (b.double() - a).norm() <= bound * a.norm()


def test_master_weights_of_another_type() -> None:
    targets = make_targets()
    hidden, weight, bias = make_head()
    assert bias is not None
    low = hidden.detach().float().requires_grad_()
    total, _, _ = sparse_cross_entropy(low, weight, bias, targets)
    a, b, c = gradients(total, low, weight, bias)
    assert (a.dtype, b.dtype, c.dtype) == (torch.float32, torch.float64, torch.float64)
    wanted = gradients(naive(hidden, weight, bias, targets, "ghost")[0], weight)[0]
    torch.testing.assert_close(b, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", MODES)
def test_tied_weights(missing: MissingMass) -> None:
    targets = make_targets()
    _, weight, bias = make_head()
    tokens = torch.tensor([1, 5, 5, 0, 22, 7, 1])
    expected = gradients(naive(weight[tokens].tanh(), weight, bias, targets, missing)[0], weight)[0]
    found = gradients(
        sparse_cross_entropy(weight[tokens].tanh(), weight, bias, targets, Objective(missing=missing), block=2)[0],
        weight,
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_frozen_parts_get_no_gradient() -> None:
    targets = make_targets()
    hidden, weight, bias = make_head()
    assert bias is not None
    total, _, _ = sparse_cross_entropy(hidden.detach(), weight.detach(), bias, targets)
    wanted = gradients(naive(hidden, weight, bias, targets, "ghost")[0], bias)[0]
    torch.testing.assert_close(gradients(total, bias)[0], wanted)
    with torch.no_grad():
        value = sparse_cross_entropy(hidden, weight, bias, targets)[0]
    assert not value.requires_grad
    torch.testing.assert_close(value, total.detach())


@pytest.mark.parametrize("missing", MODES)
def test_where_all_weight_is_the_labels_the_teacher_is_not_heard(missing: MissingMass) -> None:
    head, taught = make_head(), make_targets(weight=1.0)
    silent = Targets(taught.labels, torch.zeros_like(taught.ids), torch.zeros_like(taught.probs), taught.label_weight)
    losses = [sparse_cross_entropy(*head, t, Objective(missing=missing)) for t in (taught, silent)]
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*head), taught.labels, reduction="sum")
    wanted = gradients(expected, *head)
    for total, _, _ in losses:
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradients(total, *head), wanted)
    torch.testing.assert_close(losses[1][2], torch.zeros(N).double(), rtol=0, atol=1e-14)  # nothing taught, no loss


def test_places_that_are_not_used_change_nothing() -> None:
    head, targets = make_head(), make_targets()
    wide = Targets(
        targets.labels,
        torch.cat([targets.ids, torch.zeros(N, 4).long()], 1),
        torch.cat([targets.probs, torch.zeros(N, 4).double()], 1),
        targets.label_weight,
    )
    for missing in MODES:
        a, b = (
            sparse_cross_entropy(*head, targets, Objective(missing=missing)),
            sparse_cross_entropy(*head, wide, Objective(missing=missing)),
        )
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(gradients(a[0], *head), gradients(b[0], *head))


@pytest.mark.parametrize("missing", MODES)
def test_a_teacher_that_is_the_student_has_nothing_to_teach(missing: MissingMass) -> None:
    hidden, weight, bias = make_head()
    student = torch.nn.functional.linear(hidden, weight, bias).softmax(-1).detach()
    everything = torch.arange(V).repeat(N, 1)
    targets = Targets(torch.zeros(N).long(), everything, student, torch.zeros(N))
    total, _, fusion = sparse_cross_entropy(hidden, weight, bias, targets, Objective(missing=missing))
    entropy = -(student * student.log()).sum(-1)
    torch.testing.assert_close(fusion, entropy)
    for gradient in gradients(total, hidden, weight, bias):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


def test_the_best_part_of_the_student_teaches_nothing_but_by_renormalising() -> None:
    hidden, weight, bias = make_head()
    student = torch.nn.functional.linear(hidden, weight, bias).softmax(-1).detach()
    probs, ids = student.topk(4)
    targets = Targets(torch.zeros(N).long(), ids, probs, torch.zeros(N))
    sizes = {
        m: gradients(sparse_cross_entropy(hidden, weight, bias, targets, Objective(missing=m))[0], hidden)[0].norm()
        for m in MODES
    }
    assert sizes["ghost"] < 1e-13 and sizes["drop"] > 1e-3 and sizes["renormalise"] > 1e-3


@pytest.mark.parametrize("missing", MODES)
def test_no_positions(missing: MissingMass) -> None:
    hidden, weight, bias = make_head(n=0)
    total, label, fusion = sparse_cross_entropy(hidden, weight, bias, make_targets(n=0), Objective(missing=missing))
    assert total.item() == 0 and label.shape == fusion.shape == (0,)
    for gradient, leaf in zip(gradients(total, hidden, weight, bias), (hidden, weight, bias), strict=True):
        assert leaf is not None and gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("mass", [1.0, 0.8, 1 + 1e-7])
def test_a_teacher_of_the_whole_vocabulary(mass: float) -> None:
    head = make_head(n=3, v=4, h=2)
    probs = torch.full((3, 4), mass / 4, dtype=torch.float64)
    targets = Targets(torch.tensor([0, 1, 2]), torch.arange(4).repeat(3, 1), probs, torch.full((3,), 0.3))
    expected, found = naive(*head, targets, "ghost"), sparse_cross_entropy(*head, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found[0], *head), gradients(expected[0], *head))


@pytest.mark.parametrize("left", [0.0, 1e-4, 0.25])
@pytest.mark.parametrize("gap", [16.0, 40.0, 150.0])
def test_a_student_that_is_sure(left: float, gap: float) -> None:
    # exp(gap) is no float32 number from 89 on
    bias = torch.tensor([gap, 0, 1, 0.5], requires_grad=True)
    hidden, weight = torch.zeros(1, 1), torch.zeros(4, 1)
    targets = Targets(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[1 - left]]), torch.tensor([0.0]))
    total, _, fusion = sparse_cross_entropy(hidden, weight, bias, targets)
    rest = torch.tensor([0, 1, 0.5]).double()
    assert fusion.item() == pytest.approx(left * (gap - rest.logsumexp(0).item()), rel=1e-3, abs=1e-6)
    expected = torch.cat([torch.tensor([left]).double(), -left * rest.softmax(0)])
    torch.testing.assert_close(gradients(total, bias)[0].double(), expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the other objectives, and what heads do to logits

MEASURES = (
    *(Objective(d, m) for d in ("cross_entropy", "forward_kl") for m in MODES),
    *(Objective(d, m) for d in ("reverse_kl", "jsd") for m in ("ghost", "renormalise")),
    Objective("jsd", beta=0.2),
)
HOT = (
    Objective(teacher_temperature=2.0, student_temperature=2.0),
    Objective("forward_kl", "drop", student_temperature=0.5),
    Objective("reverse_kl", teacher_temperature=0.7, student_temperature=3.0),
    Objective("jsd", "renormalise", teacher_temperature=4.0, student_temperature=2.0, beta=0.8),
    Objective(label_smoothing=0.1),
    Objective("forward_kl", "renormalise", student_temperature=2.0, label_smoothing=0.3),
)
SHAPES = (Shape(), Shape(scale=0.25), Shape(softcap=2.0), Shape(0.5, 1.5, V - 4), Shape(vocabulary=V - 4))


@pytest.mark.parametrize("objective", [*MEASURES, *HOT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_objective_and_head(objective: Objective, shape: Shape) -> None:
    width = shape.vocabulary or V
    head, targets = make_head(), make_targets(v=width)
    targets = replace(targets, weight=torch.tensor([1, 0.5, 0, 2, 1, 1, 3]).double())
    expected = naive(*head, targets, objective=objective, shape=shape)
    found = sparse_cross_entropy(*head, targets, objective, shape, block=3)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(expected[0], *head), gradients(found[0], *head), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [*MEASURES, *HOT], ids=str)
def test_gradcheck_of_every_objective(objective: Objective) -> None:
    head, targets = make_head(n=4, v=9, h=3), make_targets(n=4, v=8, k=4)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_cross_entropy(hidden, weight, bias, targets, objective, Shape(0.7, 3.0, 8), block=3)[0]

    assert torch.autograd.gradcheck(loss, [leaf for leaf in head if leaf is not None])


@pytest.mark.parametrize("objective", [*MEASURES, *HOT], ids=str)
def test_low_precision_stays_near_with_every_objective(objective: Objective) -> None:
    targets, shape = make_targets(), Shape(softcap=5.0)
    rounded = [t.detach().bfloat16() for t in make_head() if t is not None]
    reference = [t.double().requires_grad_() for t in rounded]
    expected = naive(reference[0], reference[1], reference[2], targets, objective=objective, shape=shape)
    wanted = gradients(expected[0], *reference)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        head = [t.to(dtype).requires_grad_() for t in rounded]
        total, _, _ = sparse_cross_entropy(head[0], head[1], head[2], targets, objective, shape, block=3)
        assert abs(total.item() - expected[0].item()) <= bound * abs(expected[0].item())
        for a, b in zip(wanted, gradients(total, *head), strict=True):
            assert (b.double() - a).norm() <= bound * a.norm()


@pytest.mark.parametrize("objective", MEASURES, ids=str)
def test_a_teacher_that_is_the_student_gives_no_gradient_by_any_measure(objective: Objective) -> None:
    hidden, weight, bias = make_head()
    student = torch.nn.functional.linear(hidden, weight, bias).softmax(-1).detach()
    everything = torch.arange(V).repeat(N, 1)
    targets = Targets(torch.zeros(N).long(), everything, student, torch.zeros(N))
    total, _, fusion = sparse_cross_entropy(hidden, weight, bias, targets, objective)
    if objective.divergence != "cross_entropy":
        torch.testing.assert_close(fusion, torch.zeros_like(fusion), rtol=0, atol=1e-13)
    for gradient in gradients(total, hidden, weight, bias):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


@pytest.mark.parametrize("objective", [*MEASURES, *HOT], ids=str)
def test_what_is_masked_gives_exactly_nothing(objective: Objective) -> None:
    head = make_head()
    targets = replace(make_targets(), weight=torch.zeros(N))
    total, _, _ = sparse_cross_entropy(*head, targets, objective, Shape(softcap=3.0))
    assert total.item() == 0
    assert not any(gradient.any() for gradient in gradients(total, *head))


def test_coarse_divergences_are_no_more_than_whole_ones() -> None:
    hidden, weight, bias = make_head()
    q = torch.nn.functional.linear(hidden, weight, bias).softmax(-1).detach()
    p = torch.softmax(torch.randn(N, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64), -1)
    m = (p + q) / 2
    whole = {
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "forward_kl": (p * (p / q).log()).sum(-1),
    }
    probs, ids = p.topk(5)
    for name, bound in whole.items():
        targets = Targets(torch.zeros(N).long(), ids, probs, torch.zeros(N))
        found = sparse_cross_entropy(hidden, weight, bias, targets, Objective(name))[2].detach()  # type: ignore[arg-type]
        assert (found > 0).all() and (found <= bound).all()


def test_padding_of_the_head_is_never_taught() -> None:
    hidden, weight, bias = make_head()
    assert bias is not None
    width = V - 4
    targets = make_targets(v=width, weight=0.0)
    for objective in (*MEASURES, *HOT):
        total, _, _ = sparse_cross_entropy(hidden, weight, bias, targets, objective, Shape(vocabulary=width))
        pull = gradients(total, bias)[0][width:]
        if objective.divergence in ("cross_entropy", "forward_kl"):
            assert (pull >= 0).all()  # down, by what the student gives them, and never up
        if objective.missing == "ghost":  # the same as if the student could not give them anything
            tokens = Targets(targets.labels, targets.ids, targets.probs, targets.label_weight)
            sure = torch.cat([bias[:width], torch.full((4,), -1e3).double()])
            a = sparse_cross_entropy(hidden, weight * (torch.arange(V) < width)[:, None], sure, tokens, objective)[0]
            b = sparse_cross_entropy(hidden, weight[:width], bias[:width], tokens, objective)[0]
            torch.testing.assert_close(a, b)


def test_a_wide_head_in_low_precision() -> None:
    """More rows than one slice of the head's gradient, several blocks, a gradient that takes its sums' memory."""
    v, h, n = 20_000, 8, 40
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).bfloat16()
    weight = torch.randn(v, h, generator=generator).bfloat16()
    targets = make_targets(n=n, v=v)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for into, dtype in ((found, torch.bfloat16), (wanted, torch.float64)):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (hidden, weight)]
        total, _, _ = sparse_cross_entropy(*leaves, None, targets, block=16)
        (2 * total).backward()
        into += [leaf.grad.double() for leaf in leaves]  # type: ignore[union-attr]
    for a, b in zip(wanted, found, strict=True):
        assert (b - a).norm() <= 2e-2 * a.norm()


def test_low_precision_gradients_are_handed_over_once() -> None:
    hidden, weight, _ = (None if t is None else t.detach().bfloat16().requires_grad_() for t in make_head())
    assert hidden is not None and weight is not None
    total, _, _ = sparse_cross_entropy(hidden, weight, None, make_targets())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over once"):
        total.backward()
