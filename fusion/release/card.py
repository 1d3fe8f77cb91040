"""The model card: what a reader of the hub needs to know of the released checkpoint."""

import html
import re
from pathlib import Path

import yaml

from fusion.config import SAMPLERS, Align, Config, Model
from fusion.release.summary import Summary, change, verdict

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z", re.ASCII)
_TAGS = ("model-fusion", "knowledge-distillation", "merge")


def model_card(summary: Summary, config: Config) -> str:
    """`README.md` of the released checkpoint as the hub reads it: YAML front matter, then Markdown."""
    parts = [
        _front_matter(config),
        f"# {_plain(config.name)}",
        _what(summary, config),
        f"## Held-out bits per byte\n\n{_scores(summary)}\n\n{_plain(verdict(summary))}",
        f"## Settings\n\n{_settings(summary, config)}",
        f"## How to load it\n\n{_loading(config)}",
        f"## Limits and licences\n\n{_limits(config)}",
        f"## Citations\n\n{_CITATIONS}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Config) -> str:
    """YAML with all values in double quotes: a name like `1e3`, `no` or `a: b` stays a name in any YAML."""
    bases = dict.fromkeys(m.model for m in (config.pivot, *config.sources) if _on_hub(m))
    lines = [f"license: {_quoted(config.release.license)}"] if config.release.license else []
    if bases:
        lines += ["base_model:", *(f"- {_quoted(base)}" for base in bases)]
        lines += ['base_model_relation: "merge"']
    lines += ['library_name: "transformers"', 'pipeline_tag: "text-generation"', "tags:"]
    return "\n".join(["---", *lines, *(f"- {_quoted(tag)}" for tag in _TAGS), "---"])


def _quoted(text: str) -> str:
    return str(yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)).strip()


def _on_hub(model: Model) -> bool:
    """Whether a model is named by hub id: a folder that is there comes first, as in `hub.locate`."""
    return bool(_HUB_ID.match(model.model)) and not Path(model.model).expanduser().is_dir()


def _plain(text: object) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _code(text: object) -> str:
    return f"<code>{_plain(text)}</code>"  # unlike backquotes, holds any character


def _named(model: Model) -> str:
    """A link for a model of the hub; of a folder only its name: its path is nobody's business."""
    if _on_hub(model):
        return f"[{_plain(model.model)}](https://huggingface.co/{model.model})"
    return _code(Path(model.model).name)


def _what(summary: Summary, config: Config) -> str:
    measured = {s.name: f" ({_plain(s.architecture)}, {s.parameters:,} parameters)" for s in summary.having("source")}
    sources = "\n".join(f"- {_plain(s.name)}: {_named(s)}{measured.get(s.name, '')}" for s in config.sources)
    fused, distill = summary.fused, config.distill
    taught = "one target for each source" if distill.topology == "pairwise" else "one target from all sources"
    size = f"{_plain(fused.architecture)}, {fused.parameters:,} parameters"
    return f"""One language model ({size}) that learned from
others, whatever their architectures and tokenizers. It has the architecture and the tokenizer of its pivot,
{_named(config.pivot)}.

Its sources:

{sources}

How it was made: each source read the training samples once, and its most likely next tokens were kept. They
were carried over to the pivot's tokenizer where both tokenizers have read the same bytes. The pivot was then
trained on the labels and on what the sources expected, {taught}, and the targets were
merged ({_code(summary.merge.method)})."""


def _scores(summary: Summary) -> str:
    head = ["model", "role", *map(_plain, summary.domains), "mean", "vs pivot"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for m in summary.ordered():
        bits = [f"{m.on(d):.4f}" for d in (*summary.domains, None)]
        against = "–" if m.role == "pivot" else f"{change(m.mean, summary.pivot.mean):+.2f} %"
        cells = [_plain(m.subject), m.role, *bits, against]
        rows.append([f"**{cell}**" for cell in cells] if m.role == "fused" else cells)
    samples = ", ".join(f"{_plain(d)} {n}" for d, n in summary.heldout.items())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Lower is better. Held-out samples by domain: {samples}.\n\n{table}"


def _map(align: Align) -> str:
    """How a source's words become the target's."""
    if align.procedure != "boundaries":
        return f"{align.procedure}, as published"
    return ", else ".join(align.maps) + (", along the text" if align.follow else "")


_PIVOT = {"teach": "teaches like a source", "gate": "silences where it is best", "absent": "takes no part"}


def _settings(summary: Summary, config: Config) -> str:
    capture, distill, merge = config.capture, config.distill, summary.merge
    sampled = SAMPLERS[capture.sampler]
    scaled = [merge.far] if merge.far else []
    told = {
        "kept of each source": ", ".join([capture.sampler, *(f"{k} {getattr(capture, k)}" for k in sampled)]),
        "vocabulary map": _map(config.align),
        "topology": distill.topology,
        "gate": f"{distill.gate}; the pivot {_PIVOT[distill.pivot]}",
        "label weight": distill.label_weight,
        "missing mass": distill.missing_mass,
        "epochs": distill.epochs,
        "learning rate": distill.learning_rate,
        "batch size": f"{distill.batch_size} samples",
        "merge": ", ".join([merge.method, *(f"{k} {v}" for k, v in merge.parameters.items()), *scaled]),
        "seed": summary.seed,
    }
    rows = [f"| {k} | {_plain(v)} |" for k, v in told.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _loading(config: Config) -> str:
    where = repr(config.release.hub or "path/to/this/folder")
    more = ", trust_remote_code=True" if config.pivot.trust_remote_code else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where}{more})
model = AutoModelForCausalLM.from_pretrained({where}{more}, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48)[0], skip_special_tokens=True))
```"""


def _limits(config: Config) -> str:
    named = ", ".join(_named(m) for m in (config.pivot, *config.sources))
    given = config.release.license
    own = f"is released under {_plain(given)}" if given else "states no licence"
    return f"""- It was measured by held-out bits per byte on the domains above, and on nothing else: not on
  tasks, instructions, safety or other languages. It may say what is wrong or harmful, as its pivot and
  its sources may.
- It has learned from its sources' outputs. Read the licences of the pivot, of every source and of the
  training data before you use or pass on this model; some forbid commercial use, or training other models on
  outputs. Pivot and sources: {named}. This checkpoint {own}; that does not lift theirs."""


_CITATIONS = """```bibtex
@inproceedings{wan2024fusellm,
  title = {Knowledge Fusion of Large Language Models},
  author = {Wan, Fanqi and Huang, Xinting and Cai, Deng and Quan, Xiaojun and Bi, Wei and Shi, Shuming},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2401.10491}
}
@article{wan2024fusechat1,
  title = {Knowledge Fusion of Chat {LLMs}: A Preliminary Technical Report},
  author = {Wan, Fanqi and Yang, Ziyi and Zhong, Longguang and Quan, Xiaojun and Huang, Xinting and Bi, Wei},
  journal = {arXiv:2402.16107},
  year = {2024}
}
@article{wan2024fusechat2,
  title = {{FuseChat}: Knowledge Fusion of Chat Models},
  author = {Wan, Fanqi and Zhong, Longguang and Yang, Ziyi and Chen, Ruijun and Quan, Xiaojun},
  journal = {arXiv:2408.07990},
  year = {2024}
}
```"""
