"""A causal model in two halves: its body reads tokens, its head says what follows, a block of positions at a time.

So (tokens × vocabulary) logits never exist. What a model does beside its head (Gemma's soft cap, Granite's scale) is
its own code still: for the head, the model's forward is called with a body that hands back what the real one said.
"""

import copy
from typing import Any

import torch
from torch import nn


class Halves:
    """Body and head of a model.

    Attributes:
        width: ids that logits are given for.
        split: False where head and body could not be told apart; then `all_logits` alone is to be called.
    """

    def __init__(self, model: Any):
        self._model = model
        self._body: nn.Module | None = None
        self._said: Any = None
        ids = torch.arange(6, device=next(model.parameters()).device)[None] % 4
        with torch.inference_mode():
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            self.width = int(wanted.shape[-1])
            self._body = _body_of(model, ids)
            self.split = self._body is not None and self._agrees(ids, wanted)

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the body makes of ids (B, T): (B, T, H)."""
        assert self._body is not None
        self._said = self._body(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: torch.Tensor = self._said.last_hidden_state
        return hidden

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The model's logits (N, V) for some positions of what `hidden` gave last."""
        assert self._body is not None
        said = copy.copy(self._said)
        said.last_hidden_state = hidden_NH[None]
        ids = torch.zeros((1, len(hidden_NH)), dtype=torch.long, device=hidden_NH.device)
        own = self._body.forward
        self._body.forward = lambda *_, **__: said
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            self._body.forward = own

    def all_logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, V), for a model that could not be split."""
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _agrees(self, ids: torch.Tensor, wanted: torch.Tensor) -> bool:
        try:
            hidden = self.hidden(ids, torch.ones_like(ids))[0]
            found = torch.cat([self.logits(hidden[:4]), self.logits(hidden[4:])])
        except (TypeError, AttributeError, ValueError, RuntimeError):  # a body that is called in a way of its own
            return False
        least = 2e-2 if found.dtype in (torch.float16, torch.bfloat16) else 1e-4
        return found.shape == wanted[0].shape and torch.allclose(found, wanted[0], rtol=least, atol=least)


def _body_of(model: Any, ids: torch.Tensor) -> nn.Module | None:
    """The outermost module whose `last_hidden_state` is what the output head is given."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    given: list[torch.Tensor] = []
    said: list[tuple[nn.Module, torch.Tensor]] = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        last = getattr(out, "last_hidden_state", None)
        if module is not model and isinstance(last, torch.Tensor):
            said.append((module, last))

    hooks = [head.register_forward_pre_hook(lambda _, args: given.append(args[0]))]
    hooks += [module.register_forward_hook(note) for module in model.modules()]
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    # equal, not the same: what Mamba's body says in float32 its head is given in bfloat16
    found = [module for module, last in said if given and _equal(last, given[-1])]
    return found[-1] if found else None


def _equal(said: torch.Tensor, given: torch.Tensor) -> bool:
    return said.shape == given.shape and torch.equal(said.to(given), given)
