"""Whether all models' templates can show the chats: asked before hours of reading, not within them."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from fusion import hub
from fusion.config import Config
from fusion.corpus import Corpus
from fusion.records import Sample
from fusion.tokens.render import Renderer

_GROUPS = 64  # of a part that are looked through; samples stand in the order of their hashes
_FIRST, _ORDERS = 64, 256  # chats of a part that are tried whatever they are, and orders of roles


def try_templates(config: Config, folders: Mapping[str, Path], prepared: Path) -> None:
    """Render chats by all that will read them: one of each order of roles, and the first ones of each part.

    Args:
        folders: the models', by name.
        prepared: the finished folder of the stage prepare.

    Raises:
        ValueError: a template refuses a chat, or changes what is said in it.
    """
    chats = {part: _some(Corpus(prepared, part)) for part in ("train", "validation", "heldout")}
    keys = {model.name: f"sources.{n}.template" for n, model in enumerate(config.sources)}
    for model in (config.pivot, *(source for source in config.sources if source.cache is None)):
        reads = [sample for part in chats if model is config.pivot or part != "validation" for sample in chats[part]]
        if not reads:
            continue
        renderer = Renderer(hub.load_tokenizer(model, folders[model.name]), model.name, hub.template_of(model))
        for sample in reads:
            try:
                renderer.render(sample)
            except ValueError as error:
                raise ValueError(
                    f"{error}; set {keys.get(model.name, 'pivot.template')} to plain or a Jinja file that shows it, or "
                    "leave such chats out of prepare.data"
                ) from error


def _some(corpus: Corpus) -> list[Sample]:
    if not corpus.chats:
        return []
    samples = (sample for n in range(min(corpus.groups, _GROUPS)) for sample in corpus.group(n))
    chats = [sample for sample in samples if sample.messages]
    orders: dict[tuple[str, ...], Sample] = {}
    for sample in chats:
        orders.setdefault(tuple(message.role for message in sample.messages), sample)
    found = [*chats[:_FIRST], *islice(orders.values(), _ORDERS)]
    return list({sample.id: sample for sample in found}.values())
