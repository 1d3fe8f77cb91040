"""The arithmetic of `--plan`, pure: what docs/scale.md works out, as functions; and figures as people read them."""

from collections.abc import Iterable, Mapping
from math import ceil, prod
from typing import Any

from fusion.config import Capture, Distill

BYTES_PER_TOKEN = 4.0  # English prose under vocabularies of 32,000 to 150,000 ids
DEVICE_FLOPS = 400e12  # a second: bfloat16 on an H100 at 40% of its peak
DEVICE_BYTES = 80e9  # memory of the device that is assumed where none is here
WEIGHTS_SHARE = 0.8  # of a device's memory; the rest is for activations, logits and gathered layers
PASS_FLOPS = 2  # per active parameter and token: one forward pass; training takes three times that
STATE_BYTES = {"optimizer": 12, "gradients": 2, "weights": 2}  # per parameter that is trained in bfloat16
NODE = 8  # devices of one machine
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_bytes(settings: Capture) -> float:
    """Bytes a token of a source's cache, as measured on small models (docs/scale.md); `nucleus` at its most.

    A token has its own id, log-probability and place; an entry its id and, where it is exact, its log-probability.
    N draws meet about N^0.8 different ids, and fewer the surer the model is.
    """
    exact = {"random": 0, "hybrid": settings.head}.get(settings.sampler, settings.k)
    drawn = settings.draws**0.8 if settings.sampler in ("random", "hybrid") else 0.0
    weight = 1.0 if settings.temperature == 1 else 2.0
    return 5.5 + (1.5 if exact else 0.0) + 1.2 * exact + weight * drawn


def reading_hours(active: float, tokens: float) -> float:
    """Device hours in which a model of so many active parameters reads so many tokens."""
    return PASS_FLOPS * active * tokens / DEVICE_FLOPS / 3600


def devices_for(weights: float, memory: float) -> int:
    """How many devices hold so many bytes of weights together."""
    return max(1, ceil(weights / (WEIGHTS_SHARE * memory)))


def nodes_for(hours: float, days: float, weights: float, memory: float) -> int:
    """How many nodes do so many device hours within some days, and hold the weights."""
    return max(ceil(hours / (24 * days * NODE)), ceil(devices_for(weights, memory) / NODE), 1)


def state_parts(zero: Mapping[str, Any], lora: bool) -> tuple[str, ...]:
    """What of `STATE_BYTES` a training has on its devices: of low-rank updates, which are small, the weights alone.

    Args:
        zero: `zero_optimization` of the DeepSpeed file; what it offloads is elsewhere.
    """
    offloaded = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    away = [part for part, key in offloaded.items() if _device(zero.get(key)) != "none"]
    return tuple(part for part in (["weights"] if lora else STATE_BYTES) if part not in away)


def state_a_device(parameters: float, stage: int, devices: int, parts: Iterable[str] = tuple(STATE_BYTES)) -> float:
    """Bytes of weights, gradients and optimizer state of a model in training, what the ZeRO stage shards divided."""
    sharded = {"optimizer": stage >= 1, "gradients": stage >= 2, "weights": stage >= 3}
    return parameters * sum(STATE_BYTES[part] / (devices if sharded[part] else 1) for part in parts)


def _device(offload: Any) -> str:
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def checkpoints_bytes(parameters: float, stage: int, settings: Distill) -> float:
    """Bytes that a training has on the disk at its most: two checkpoints, the next one, and weights put aside.

    Below ZeRO-3 a checkpoint has the weights twice, transformers' and DeepSpeed's. Weights are put aside at each
    evaluation that is the best so far, and those before go with the next checkpoint. Low-rank updates are small.
    """
    if settings.lora is not None:
        return parameters * 3 * STATE_BYTES["weights"]
    each = STATE_BYTES["weights"] * (1 if stage == 3 else 2) + STATE_BYTES["optimizer"]
    aside = max(settings.evaluations - 1, 0) if settings.keep == "best" else 0
    return parameters * (3 * each + aside * STATE_BYTES["weights"])


def product(*factors: float | None) -> float | None:
    """None where a factor is not known."""
    known = [f for f in factors if f is not None]
    return prod(known) if len(known) == len(factors) else None


def total(parts: Iterable[float | None]) -> float | None:
    """None where a part is not known."""
    values = list(parts)
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def count(value: float | None) -> str:
    """1234567 → 1.2 M."""
    if value is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def in_bytes(value: float | None) -> str:
    """1234567 → 1.2 MB."""
    return "?" if value is None else f"{count(value)}B"


def in_hours(value: float | None) -> str:
    """1234.56 → 1,234.6, and 0.01234 → 0.012."""
    if value is None:
        return "?"
    if value == 0 or value >= 0.0005:
        return f"{value:,.1f}" if value >= 1 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"
    return "< 0.001"
