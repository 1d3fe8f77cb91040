"""Whether all models' templates can show the chats: asked before hours of reading, not within them."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from fusion import hub, tracking
from fusion.config import Config
from fusion.corpus import Corpus
from fusion.records import Carries, Sample
from fusion.tokens.render import Renderer

_GROUPS = 64  # of a part from which chats are read whole; samples stand in the order of their hashes
_FIRST, _ORDERS = 64, 256  # chats of a part that are read whole whatever they are, and orders of roles


def try_templates(config: Config, folders: Mapping[str, Path], prepared: Path) -> None:
    """Show all chats by the template of each model that will read them, and read some whole.

    Says so where no turn of these ends in a token that a target could learn to stop by.

    Args:
        folders: the models', by name.
        prepared: the finished folder of the stage prepare.

    Raises:
        ValueError: a template refuses chats, or changes what is said in them.
    """
    parts = {part: Corpus(prepared, part) for part in ("train", "validation", "heldout")}
    parts = {part: corpus for part, corpus in parts.items() if corpus.chats}
    some = {part: _some(corpus) for part, corpus in parts.items()}
    keys = {model.name: f"sources.{n}.template" for n, model in enumerate(config.sources)}
    for model in (config.pivot, *(source for source in config.sources if source.cache is None)):
        reads = [part for part in parts if model is config.pivot or part != "validation"]
        if not reads:
            continue
        renderer = Renderer(hub.load_tokenizer(model, folders[model.name]), model.name, hub.template_of(model))
        remedy = f"set {keys.get(model.name, 'pivot.template')} to plain or a Jinja file"
        try:
            whole = itertools.chain(*(parts[part] for part in reads))
            total = sum(len(parts[part]) for part in reads)
            _show_all(renderer, tracking.progress(whole, f"chat template of {model.name}", total))
            found = [renderer.render(sample) for part in reads for sample in some[part]]
            answered = any(message.role == "assistant" for part in reads for s in some[part] for message in s.messages)
            if answered and not any((shown.carries == Carries.END).any() for shown in found):
                tracking.say(
                    f"  {model.name}: its chat template ends turns in no special token, so that nothing teaches to "
                    f"stop; {remedy} that ends them in one"
                )
        except ValueError as error:
            raise ValueError(f"{error}; {remedy} that shows them, or leave such chats out of prepare.data") from error


def _show_all(renderer: Renderer, samples: Iterator[Sample]) -> None:
    """ValueError with the first chat that the template cannot show, and how many there are of them."""
    first, refused, count = None, 0, 0
    for sample in samples:
        if not sample.messages:
            continue
        count += 1
        try:
            renderer.check(sample)
        except ValueError as error:
            first, refused = first or error, refused + 1
    if first is not None:
        raise ValueError(f"{first} (as in {refused} of {count} chats)") from first


def _some(corpus: Corpus) -> list[Sample]:
    found = (sample for n in range(min(corpus.groups, _GROUPS)) for sample in corpus.group(n))
    chats = [sample for sample in found if sample.messages]
    orders: dict[tuple[str, ...], Sample] = {}
    for sample in chats:
        orders.setdefault(tuple(message.role for message in sample.messages), sample)
    chosen = [*chats[:_FIRST], *itertools.islice(orders.values(), _ORDERS)]
    return list({sample.id: sample for sample in chosen}.values())
