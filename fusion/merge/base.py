"""The pivot as a base of its targets: the same tensors by the same names.

Checkpoints on the hub hold what transformers does not write again: buffers of older versions, prefixes left away,
layers that predict further tokens, the vision part of a model whose language part is trained.
"""

import shutil
from pathlib import Path

from fusion import hub
from fusion.config import Model
from fusion.merge import correspond
from fusion.merge.jobs import MERGEABLE, numel
from fusion.merge.opening import open_model
from fusion.merge.writer import copy_beside


def base_for(pivot: Model, folder: Path, target: Path, saved: Path) -> Path:
    """The folder to merge on: the pivot's own where it has the target's tensors, else `saved`.

    There the pivot is written as transformers loads it, in the type most of its weights are stored in, with all that
    lies beside its weights. Once written it is taken as it is.

    Args:
        pivot: the config's entry.
        folder: where its checkpoint is.
        target: a checkpoint trained from it.
        saved: a folder that needs not be there.

    Raises:
        ValueError: a folder that is no checkpoint.
    """
    if saved.is_dir():
        return saved
    one, other = (correspond.Model(str(path), open_model(str(path))) for path in (folder, target))
    try:
        correspond.leave_out_buffers([one, other])
        one.leave_out_copies()
        if correspond.same_tensors(one, other):
            return folder
        dtype = _most(one)
    finally:
        for model in (one, other):
            model.checkpoint.close()
    draft = saved.with_name(f"{saved.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    hub.load_model(pivot, folder, dtype).save_pretrained(draft)
    made = (draft / "config.json").read_bytes()  # of the part that is trained; the hub's may tell of others
    copy_beside(folder, draft)
    (draft / "config.json").write_bytes(made)
    draft.rename(saved)
    return saved


def _most(model: correspond.Model) -> str:
    """The type of most of a model's weights."""
    sizes = dict.fromkeys(MERGEABLE, 0)
    for view in (model.view(name) for name in model.names):
        if view.dtype in sizes:
            sizes[view.dtype] += numel(view.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])
