"""What a fusion came to: one frozen record from which the table, the report and the model card are made."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["source", "pivot", "control", "target", "fused"]
ROLES: tuple[Role, ...] = get_args(Role)  # in the order in which models are shown


@dataclass(frozen=True)
class Scored:
    """One model, measured.

    Attributes:
        name: a target's may be `target-SUBJECT`, to tell it from the source SUBJECT.
        bits: domain → held-out bits per byte.
        mean: their mean over domains.
        parameters: how many, tied weights once.
        path: where it is: a folder or a hub id.
    """

    name: str
    role: Role
    bits: dict[str, float]
    mean: float
    parameters: int
    architecture: str
    path: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r} will not do; one of {', '.join(ROLES)}")
        for what, value in {**self.bits, "the mean": self.mean}.items():
            if not (math.isfinite(value) and value > 0):
                wanted = "a working model has a finite number above 0"
                raise ValueError(f"{self.name}: {value} bits per byte on {what}; {wanted}")

    @property
    def subject(self) -> str:
        """The name as it is shown, beside the role: for a target, that of its source or topology."""
        return self.name.removeprefix("target-") if self.role == "target" else self.name

    def on(self, domain: str | None) -> float:
        """Bits per byte on a domain; their mean for None."""
        return self.mean if domain is None else self.bits[domain]


@dataclass(frozen=True)
class StageFacts:
    """What a stage's manifest tells.

    Attributes:
        label: `stage` or `stage/subject`, as `artifact.Artifact.label`.
        seconds: how long it took; None where that is not known.
    """

    label: str
    seconds: float | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class MergeFacts:
    """How the targets became one.

    Attributes:
        names: the targets.
        coefficients: (tensor name, coefficient of each target); empty where a tensor was copied.
        updates: (tensor name, mean squared update of each target); empty where there was no base.
        scale, outside: of the merged update, in the layers and outside of them (embeddings, head, last norm).
    """

    method: str
    parameters: dict[str, Any]
    names: tuple[str, ...]
    coefficients: tuple[tuple[str, tuple[float, ...]], ...] = ()
    updates: tuple[tuple[str, tuple[float, ...]], ...] = ()
    scale: float = 1.0
    outside: float = 1.0

    def __post_init__(self) -> None:
        for tensor, values in (*self.coefficients, *self.updates):
            if len(values) not in (0, len(self.names)):
                raise ValueError(f"{tensor}: {len(values)} values for {len(self.names)} targets {self.names}")

    @property
    def far(self) -> str:
        """How much of the update was taken, in words; empty for all of it."""
        if self.scale == self.outside:
            return "" if self.scale == 1 else f"{self.scale:g} of the update"
        return f"{self.scale:g} of the layers' update and {self.outside:g} of the others'"


@dataclass(frozen=True)
class Summary:
    """A whole fusion.

    Attributes:
        continuations: (prompt, what the fused model wrote after it).
        heldout: domain → samples measured on.

    Raises:
        ValueError: there is not exactly one pivot and one fused model, or a model lacks a domain.
    """

    name: str
    seed: int
    models: tuple[Scored, ...]
    stages: tuple[StageFacts, ...]
    merge: MergeFacts
    continuations: tuple[tuple[str, str], ...]
    heldout: dict[str, int]

    def __post_init__(self) -> None:
        for role, least in (("pivot", 1), ("fused", 1), ("control", 0)):
            found = [m.name for m in self.models if m.role == role]
            if not least <= len(found) <= 1:
                raise ValueError(f"{self.name}: {len(found)} models are {role} {found}; there must be one")
        if not self.heldout:
            raise ValueError(f"{self.name}: heldout is {self.heldout}; nothing was measured")
        for model in self.models:
            if lacking := [d for d in self.heldout if d not in model.bits]:
                raise ValueError(f"{model.name}: was not measured on {', '.join(lacking)}")

    @property
    def domains(self) -> tuple[str, ...]:
        """What was measured on, in the order of `heldout`."""
        return tuple(self.heldout)

    @property
    def pivot(self) -> Scored:
        """The model that each target started from."""
        return self.having("pivot")[0]

    @property
    def fused(self) -> Scored:
        """The result."""
        return self.having("fused")[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """Who taught, measured or not: the weights of one whose cache was given need not be here."""
        aligned = (s.label.removeprefix("align/") for s in self.stages if s.label.startswith("align/"))
        taught = dict.fromkeys([*aligned, *(m.name for m in self.having("source"))])
        return tuple(name for name in taught if name != self.pivot.name)  # it may teach, too

    def having(self, role: Role) -> tuple[Scored, ...]:
        """The models of a role."""
        return tuple(m for m in self.models if m.role == role)

    def ordered(self) -> tuple[Scored, ...]:
        """All models: sources, pivot, control, targets, fused."""
        return tuple(m for role in ROLES for m in self.having(role))

    def subjects(self, stage: str) -> dict[str, dict[str, Any]]:
        """Subject → facts of one stage's folders: `subjects("capture")` has one a source."""
        split = ((s.label.partition("/"), s.facts) for s in self.stages)
        return {subject: facts for (name, _, subject), facts in split if name == stage}

    def to_json(self) -> str:
        """The summary as JSON. A number in `facts` that is not finite becomes null: JSON has none."""
        from pydantic import TypeAdapter

        return TypeAdapter(Summary).dump_json(self, indent=1).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Summary":
        """The inverse of `to_json`; tuples within `facts` come back as lists.

        Raises:
            ValueError: one line: the text is no summary.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(Summary).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise ValueError(f"results: {where} will not do: {first['msg']}; release again") from None


def change(value: float, reference: float) -> float:
    """How much more than `reference` a figure is, in percent to two places; what rounds to nothing is 0.0."""
    return round(100 * (value / reference - 1), 2) + 0.0  # + 0.0 makes a negative zero positive


def verdict(summary: Summary) -> str:
    """Two sentences: the fused model beside pivot, control and best target, and where it is worse.

    Models are equal when their means differ by less than 0.005%.
    """
    fused, targets = summary.fused, sorted(summary.having("target"), key=lambda m: m.mean)
    rivals = [("the pivot", summary.pivot)]
    rivals += [("the control trained on labels alone", model) for model in summary.having("control")]
    rivals += [(f"the {'best' if targets[1:] else 'only'} target {m.subject}", m) for m in targets[:1]]
    changes = {who: change(fused.mean, rival.mean) for who, rival in rivals}
    beside = [f"{_beside(changes[who])} {who} ({rival.mean:.4f})" for who, rival in rivals]
    n = len(summary.domains)
    over = f"the mean of {n} held-out domains" if n > 1 else "the one held-out domain"
    first = f"On {over} the fused model needs {fused.mean:.4f} bits per byte: {'; '.join(beside)}."
    worse = [who for who, percent in changes.items() if percent > 0]
    if worse:
        second = f"So it is worse than {_listed(worse, ' and ')}"
    else:
        second = "So it is better than " + ("each of these" if len(rivals) > 1 else "it")
        if 0 in changes.values():
            second = "So none of these is better"
    lost = [d for d in summary.domains if change(fused.bits[d], summary.pivot.bits[d]) > 0]
    if n > 1 and lost:
        second += f"; by domain it is worse than the pivot on {_listed(lost, ' and ')}"
    return f"{first} {second}."


def _beside(percent: float) -> str:
    if not percent:
        return "as many as"
    return f"{abs(percent):.2f}% {'more' if percent > 0 else 'fewer'} than"


def _listed(words: list[str], last: str) -> str:
    return last.join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def curve(facts: Mapping[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """(steps, label loss, fusion loss), both in nats a token, from a target's `history`.

    The fusion loss is over the taught positions of all teachers; NaN at a step that taught nothing.
    """
    logs = [log for log in facts.get("history") or () if log.get("label_loss") is not None]
    return (
        [log["step"] for log in logs],
        [log["label_loss"] for log in logs],
        [_fusion_loss(log) for log in logs],
    )


def _fusion_loss(log: Mapping[str, Any]) -> float:
    losses = ((share, log.get(f"fusion_loss/{name}")) for name, share in taught_by(log).items())
    known = [(share, loss) for share, loss in losses if share and loss is not None]
    return sum(s * loss for s, loss in known) / sum(s for s, _ in known) if known else math.nan


def taught_by(facts: Mapping[str, Any]) -> dict[str, float]:
    """Teacher → its share of a target's positions."""
    return {k.partition("/")[2]: v for k, v in facts.items() if k.startswith("taught_by/")}


def smooth(values: list[float]) -> list[float]:
    """A centred moving average over a fifteenth of the values, one-sided at the ends; NaN stays NaN."""
    half = len(values) // 30
    out = []
    for n, value in enumerate(values):
        near = [v for v in values[max(0, n - half) : n + half + 1] if not math.isnan(v)]
        out.append(sum(near) / len(near) if not math.isnan(value) else value)
    return out


Grid = dict[str, list[float]]  # a group of tensors → one value a target


def by_layer(rows: Iterable[tuple[str, tuple[float, ...]]]) -> Grid:
    """The mean over the tensors of each layer; before them tensors outside, under their own names."""
    groups = _means((key, values) for key, _, values in _placed(rows))
    return dict(sorted(groups.items(), key=lambda item: int(item[0].split()[1]) if " " in item[0] else -1))


def by_kind(rows: Iterable[tuple[str, tuple[float, ...]]]) -> Grid:
    """The mean over layers of each kind of tensor (`self_attn.q_proj`)."""
    return _means((kind, values) for _, kind, values in _placed(rows) if kind)


def _placed(
    rows: Iterable[tuple[str, tuple[float, ...]]],
) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """(`layer N` or the tensor's own name, its kind within a layer or "", its values)."""
    for name, values in rows:
        if not values:
            continue
        inside = re.search(r"(?:^|\.)(\d+)\.(.+?)(?:\.weight)?$", name)
        if inside:
            # experts of one layer are one kind
            yield f"layer {inside[1]}", re.sub(r"(?<=\.)\d+(?=\.)", "*", inside[2]), values
        else:
            yield name.removesuffix(".weight").rpartition(".")[2], "", values


def _means(rows: Iterable[tuple[str, tuple[float, ...]]]) -> Grid:
    groups: dict[str, list[tuple[float, ...]]] = {}
    for key, values in rows:
        groups.setdefault(key, []).append(values)
    return {key: [sum(c) / len(c) for c in zip(*found, strict=True)] for key, found in groups.items()}
