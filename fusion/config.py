"""What a user may say, one frozen dataclass a stage; `config_file.py` reads them."""

from dataclasses import field
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=False, allow_inf_nan=False)
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Place = Annotated[str, AfterValidator(expanduser)]  # a path, or what may be one; ~ is the user's home


@dataclass(frozen=True, config=_STRICT)
class Model:
    """A model: a folder or a hub id."""

    model: Place
    name: Name = "pivot"
    template: Place = "own"  # own | plain | the path of a Jinja file
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 where the device has it
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    cache: Place | None = None  # a cache captured before, used as it is
    parallel: Literal["none", "zero3"] = "none"  # zero3: captured with its weights spread over all ranks
    parameters: Annotated[float, Field(gt=0)] | None = None  # for --plan, while the model is not here
    active_parameters: Annotated[float, Field(gt=0)] | None = None  # those that a token passes, in a mixture of experts


@dataclass(frozen=True, config=_STRICT)
class Dataset:
    """Samples: a JSON-lines or parquet file, a folder that `datasets` loads, or a hub id."""

    data: Place
    domain: Name | None = None  # one domain for all rows; else the row's `domain` or `source`
    split: str = "train"
    subset: str | None = None
    heldout: bool = False  # every row is for measuring, none for training
    limit: Positive | None = None  # the first so many rows that are not left out
    where: dict[str, str] = field(default_factory=dict)  # keep rows whose column has this value
    megabytes: Annotated[float, Field(gt=0)] | None = None  # for --plan, while the data is not here


@dataclass(frozen=True, config=_STRICT)
class Prepare:
    """Datasets → samples."""

    data: tuple[Dataset, ...]
    max_bytes: Positive = 4096  # longer texts are split at line ends, longer chats lose their last turns
    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.05  # by hash of the content; 0 where a dataset is held out
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the rest, by hash too
    heldout_limit: Positive = 1000  # samples a domain to measure on
    # of what would be trained on, by hash; evaluated on while targets train
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    validation_limit: Positive = 64  # samples a domain; what is over it is trained on


SAMPLERS = {  # the settings that each sampler asks
    "top_k": ("k",),
    "nucleus": ("k", "mass"),
    "random": ("draws", "temperature"),
    "hybrid": ("head", "draws", "temperature"),
}


EXACT_SAMPLERS = ("top_k", "nucleus")  # the others are right on average, in what is linear in a draw
NOT_LINEAR = ("reverse_kl", "jsd")  # divergences that are not linear in the teacher's probabilities


@dataclass(frozen=True, config=_STRICT)
class Capture:
    """What is kept of each source's next-token distributions."""

    # exact entries: top_k (k of them), nucleus (those that reach `mass`, k at most); draws that stand for the whole:
    # random; `head` exact entries and draws for the rest: hybrid
    sampler: Literal["top_k", "nucleus", "random", "hybrid"] = "random"
    k: Annotated[int, Field(gt=0, lt=65536)] = 64
    mass: Annotated[float, Field(gt=0, le=1)] = 0.95
    draws: Annotated[int, Field(gt=0, le=4096)] = 50
    head: Annotated[int, Field(gt=0, lt=65536)] = 8
    temperature: Annotated[float, Field(gt=0, le=4)] = 1.0  # draws come from q^temperature; weights make up for it
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a sample whose logits are NaN or infinite
    batch_tokens: Positive = 8192
    too_long: Literal["refuse", "skip"] = "refuse"  # a sample longer than the source's context


@dataclass(frozen=True, config=_STRICT)
class Align:
    """Source token ids → target token ids."""

    # where a source teaches: where both have read the same bytes; or FuseLLM's or FuseChat's procedure as it was
    # published, map and all, for comparison
    procedure: Literal["boundaries", "fusellm", "fusechat"] = "boundaries"
    # what gives a source token its row: the first of these maps that has one
    maps: Annotated[tuple[Literal["soft", "hard", "exact", "prefix", "min_edit"], ...], Field(min_length=1)] = (
        "soft",
        "prefix",
    )
    targets_per_token: Positive = 4  # entries of a row that a token which did not follow is spread over
    follow: bool = True  # share out the mass of the token that did follow by the source's own next steps
    inside: bool = True  # teach target positions inside a source's token too; only with follow


@dataclass(frozen=True, config=_STRICT)
class Lora:
    """Low-rank updates in place of all weights (Hu et al. 2106.09685); merged into the target's weights at the end."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    modules: tuple[str, ...] | str = "all-linear"  # or a list of names; the output head is never among them

    def __post_init__(self) -> None:
        if self.modules != "all-linear" and (isinstance(self.modules, str) or not self.modules):
            shown = repr(self.modules) if self.modules else "[]"
            raise ValueError(f"distill.lora.modules: {shown} will not do: set all-linear, or a list of modules' names")


@dataclass(frozen=True, config=_STRICT)
class Distill:
    """Targets from the pivot."""

    topology: Literal["pairwise", "joint"] = "joint"  # a target a source, merged then; or one from all sources
    # who teaches, by cross-entropy in bits per byte: the best source, all by softmax(-bits / gate_temperature), all
    # alike, or as `weights` says
    gate: Literal["min_ce", "avg_ce", "all", "fixed", "none"] = "avg_ce"
    gate_level: Literal["sample", "segment", "token"] = "sample"  # what is costed and taught by itself
    gate_unit: Literal["bytes", "tokens"] = "bytes"  # tokens, of the source's own: as published; with gate_level sample
    gate_temperature: Annotated[float, Field(gt=0)] = 0.25  # bits per byte
    weights: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=dict)  # of gate: fixed
    # the pivot teaches as the gate says, under min_ce where it is better than every source (FuseLLM); or labels alone
    # teach there (gate); or the gate does not ask it (absent)
    pivot: Literal["teach", "gate", "absent"] = "teach"
    label_weight: Share = 0.3  # lambda
    # over the training: constant, linear or cosine to label_weight_end, or 1 - (1 - lambda) times the share that
    # softmax(-bits / gate_temperature) over all that the gate asks gives to those who teach
    label_schedule: Literal["constant", "linear", "cosine", "confidence"] = "constant"
    label_weight_end: Share | None = None
    divergence: Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd"] = "cross_entropy"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share
    missing_mass: Literal["ghost", "drop", "renormalise"] = "ghost"
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    student_temperature: Annotated[float, Field(gt=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    average: Literal["tokens", "samples"] = "tokens"  # what weighs alike in a step
    k: Positive = 256  # entries that are kept of what teaches: a projected distribution, or the mean of several
    control: bool = True  # one more target from labels alone, for the report
    epochs: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-5
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    # of norms and biases too, unless the DeepSpeed file has no `optimizer` and leaves it to transformers
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = 16  # samples a step, all ranks together
    per_rank: Positive = 8  # samples a rank reads at once; the rest of a step is accumulated
    # several samples in a row that do not see each other: where the model can (auto), in rows as long as the longest
    # sample (rows), or all in one (flat, for flash attention)
    packing: Literal["auto", "none", "rows", "flat"] = "auto"
    # processes a rank that build batches while it computes: 2 beside a GPU, 1 beside a CPU whose cores it shares
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 keeps float32 master weights
    lora: Lora | None = None
    freeze_embeddings: bool = False  # input embeddings and output head stay the pivot's
    gradient_checkpointing: bool = False
    evaluations: Annotated[int, Field(ge=0)] = 4  # on the validation samples, in the course of a training
    keep: Literal["best", "last"] = "best"  # the weights of the best evaluation, or those at the end
    save_steps: Positive = 500
    deepspeed: Place = "configs/deepspeed/zero2.json"
    too_long: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if self.divergence in NOT_LINEAR and self.missing_mass == "drop":
            raise ValueError(
                f"distill.missing_mass: drop will not do with divergence {self.divergence}: the student would do best "
                "to leave the entries; set ghost or renormalise"
            )
        if self.gate_unit == "tokens" and self.gate_level != "sample":
            raise ValueError(
                f"distill.gate_unit: tokens will not do with gate_level {self.gate_level}: sources share no tokens; "
                "leave it away, or set gate_level: sample"
            )
        if self.freeze_embeddings and self.lora is not None:
            raise ValueError(
                "distill.freeze_embeddings: will not do with lora, which trains neither embeddings nor head; "
                "leave it away"
            )
        scheduled = self.label_schedule in ("linear", "cosine")
        if scheduled and self.label_weight_end is None:
            raise ValueError(f"distill.label_weight_end: missing; label_schedule {self.label_schedule} goes there")
        if not scheduled and self.label_weight_end is not None:
            raise ValueError(
                f"distill.label_weight_end: {self.label_weight_end} will not do: label_schedule {self.label_schedule} "
                "does not ask it; leave it away, or set linear or cosine"
            )
        if (self.gate == "fixed") != bool(self.weights):
            why = "missing; gate fixed asks it: name: weight" if not self.weights else "will not do without gate: fixed"
            raise ValueError(f"distill.weights: {dict(self.weights) or ''}{' ' if self.weights else ''}{why}")
        if self.weights and not any(self.weights.values()):
            raise ValueError(
                f"distill.weights: {dict(self.weights)} will not do: nobody would teach; give one a weight above 0"
            )


@dataclass(frozen=True, config=_STRICT)
class Merge:
    """Targets + base → one model."""

    method: Name = "linear"
    parameters: dict[str, float | int | bool | str | list[float]] = field(default_factory=dict)
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # None: the pivot's
    # how far from the pivot to go along the merged update, 1: all of it; auto: so far as the validation samples say, in
    # the layers and outside of them; all of it where there are none; [0.9, 0.5]: in the layers, outside of them
    scale: float | str | list[float] = "auto"
    # of several targets under linear: alike, or by what each gains over the pivot on the validation samples (auto);
    # alike where there are none, and as `parameters` says where it has weights
    weights: Literal["auto", "alike"] = "auto"

    def weighs(self, targets: int) -> bool:
        """Whether so many targets are to be weighed by what they gain."""
        told = "weights" in self.parameters
        return self.weights == "auto" and self.method == "linear" and targets > 1 and not told

    def __post_init__(self) -> None:
        numbers = self.scale if isinstance(self.scale, list) else [self.scale]
        good = all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 <= n <= 4 for n in numbers)
        if self.scale != "auto" and not (good and any(numbers) and (numbers == [self.scale] or len(numbers) == 2)):
            raise ValueError(
                f"merge.scale: {self.scale!r} will not do; give a number above 0, 4 at most, two of them (in the "
                "layers, outside of them), or auto"
            )


@dataclass(frozen=True, config=_STRICT)
class Release:
    """The checkpoint, its card, its report."""

    batch_tokens: Positive = 8192
    prompts: tuple[str, ...] = ()  # continued by the fused model, for the report
    new_tokens: Positive = 48
    license: str | None = None
    hub: str | None = None  # owner/name to publish under
    private: bool = True


@dataclass(frozen=True, config=_STRICT)
class Tracking:
    """Progress and wandb."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with an API key, else offline
    project: str = "fusion"
    every: Positive = 10  # steps between log lines


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One fusion."""

    name: Name
    pivot: Model
    sources: Annotated[tuple[Model, ...], Field(min_length=1)]
    prepare: Prepare
    out: Place | None = None  # default runs/NAME
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    capture: Capture = field(default_factory=Capture)
    align: Align = field(default_factory=Align)
    distill: Distill = field(default_factory=Distill)
    merge: Merge = field(default_factory=Merge)
    release: Release = field(default_factory=Release)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        if self.pivot.name != "pivot":
            raise ValueError(f"pivot.name: {self.pivot.name!r} will not do: the pivot is called pivot; leave it away")
        if self.pivot.trust_remote_code:
            raise ValueError(
                "pivot.trust_remote_code: true will not do: what is released must load without code of its own"
            )
        names = [s.name for s in self.sources]
        for name in names:
            if name in ("pivot", "control", "fused") or names.count(name) > 1:
                raise ValueError(f"sources: the name {name!r} is taken; give each source a `name` of its own")
        known = [*names, *(["pivot"] if self.distill.pivot == "teach" else [])]
        for name in self.distill.weights:
            if name not in known:
                raise ValueError(f"distill.weights: {name!r} teaches nobody; known here: {', '.join(known)}")
        silent = [name for name in names if self.distill.gate == "fixed" and not self.distill.weights.get(name)]
        if silent and self.distill.topology == "pairwise":
            raise ValueError(
                f"distill.weights: {silent[0]} has none, and a target of its own that would learn from labels alone; "
                "give it one, leave the source away, or set distill.topology: joint"
            )
        drawn = self.capture.sampler not in EXACT_SAMPLERS
        teach = [*self.sources, *([self.pivot] if self.distill.pivot == "teach" else [])]
        if self.distill.divergence in NOT_LINEAR and drawn and any(m.cache is None for m in teach):
            raise ValueError(
                f"distill.divergence: {self.distill.divergence} will not do with capture.sampler "
                f"{self.capture.sampler}: draws are right on average only in what is linear in them; "
                "set sampler top_k or nucleus"
            )

    @property
    def folder(self) -> Path:
        """Where all stages write."""
        return Path(self.out or f"runs/{self.name}")
