"""Another order of blocks that are stored already: a folder of its own over the same files."""

import os
import shutil
from pathlib import Path

from convert import fold
from convert.copying import copy_file
from convert.destination import check_free, partial_of, require_space
from convert.layout import Options, lay_out
from convert.pipeline import describe
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint


def share(existing: Path, destination: Path, plan: LayerPlan | None) -> None:
    """Make `destination`, whose blocks are those of the folded directory `existing`.

    Its weight files are the same files under a second name: they take no disk, and stay until
    both are removed. Where the file system has no such links they are copied. Raises
    CheckpointError where `destination` exists, PlanError for a plan that does not fit.
    """
    checkpoint = open_checkpoint(existing)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    layout = lay_out(checkpoint, Options(plan=plan), fold.none(checkpoint.config))
    check_free(destination)
    partial = partial_of(destination)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    files = sorted({file for file, _ in checkpoint.tensors.values()})
    for file in files:
        try:
            os.link(existing / file, partial / file)
        except OSError:
            require_space(destination, (existing / file).stat().st_size, "name another folder")
            copy_file(existing / file, partial / file)
    provenance = checkpoint.raw_config.get("provenance")
    provenance = dict(provenance) if isinstance(provenance, dict) else {}
    provenance |= {"plan": layout.plan_text, "plan_recovered": False}
    weight_map = {name: file for name, (file, _) in checkpoint.tensors.items()}
    describe(checkpoint, partial, destination.name, layout, provenance, weight_map)
    load_tokenizer(open_checkpoint(partial))  # what was written reads back
    partial.rename(destination)
