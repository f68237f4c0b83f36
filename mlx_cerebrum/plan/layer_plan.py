"""Layer plans: which stored block runs at each position of the forward pass.

A plan is mergekit passthrough YAML, read strictly (mergekit.py), and everything it says
that bears on one source model. It knows no weights and opens nothing but the YAML:

    plan = resolve("cerebrum-12.25b")
    plan.layer_map(32)  # (0, 1, ..., 7, 4, 5, ..., 31): 56 positions over 32 blocks
"""

import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.files.foreign import stand_in
from mlx_cerebrum.model.config import MAX_POSITIONS
from mlx_cerebrum.model.tensors import (
    ATTENTION_OUT,
    BLOCK,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MLP_OUT,
    module_path,
)
from mlx_cerebrum.plan.mergekit import Merge, Scale, Slice, read
from mlx_cerebrum.plan.yaml_places import MAX_CHARACTERS, documents
from mlx_cerebrum.text import one_line

__all__ = ["LayerPlan", "Scale", "Slice", "interleave", "named_plans", "resolve"]

_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class LayerPlan(Merge):
    """A valid plan: what its YAML says, and that YAML as given, for the record."""

    name: str
    text: str = field(repr=False)

    @classmethod
    def from_text(cls, text: str, where: str = "plan", document: int | None = None) -> "LayerPlan":
        """Read YAML. Raises PlanError, one line starting with `where:LINE`.

        document: which one to take, from 1, of text that holds several.
        """
        shown = one_line(where)
        found = documents(text, shown)
        count = len(found)
        if document is None and count > 1:
            lines = ", ".join(str(root.line) for root, _ in found[:5]) + ", ..." * (count > 5)
            raise PlanError(
                f"{shown}: holds {count} documents (they begin on lines {lines});"
                f" name the one to take, {shown}#1 to #{count}"
            )
        number = 1 if document is None else document
        if not 0 < number <= count:
            raise PlanError(f"{shown}: has no document {number}; it has {count}")
        root, own_text = found[number - 1]
        name = one_line(Path(where).name.removesuffix(".yml").removesuffix(".yaml"))
        return cls(**vars(read(root)), name=name, text=text if document is None else own_text)

    @classmethod
    def from_file(cls, path: str | Path, document: int | None = None) -> "LayerPlan":
        """Read a YAML file. Raises PlanError also where it cannot be read."""
        where = one_line(str(path))
        try:
            with Path(path).open("rb") as file:
                raw = file.read(4 * MAX_CHARACTERS + 1)  # UTF-8 takes at most 4 bytes each
            if raw.strip(b"\0") and (problem := stand_in(Path(path), raw)):
                raise PlanError(one_line(problem))
            text = raw.decode("utf-8-sig")
        except OSError as error:
            raise PlanError(f"{where}: {error.strerror or error}") from None
        except ValueError:  # not UTF-8, or a path with a NUL
            raise PlanError(f"{where}: not UTF-8 text; a plan is a YAML file") from None
        return cls.from_text(text, str(path), document)

    @classmethod
    def named(cls, name: str) -> "LayerPlan":
        """A plan that ships with the package. Raises PlanError listing them."""
        if name not in named_plans():
            raise PlanError(f"no plan is named {one_line(repr(name))}; {_names()}")
        text = (files("mlx_cerebrum.plan") / "named" / f"{name}.yml").read_text(encoding="utf-8")
        return cls.from_text(text, f"{name}.yml")

    @property
    def blocks_needed(self) -> int | None:
        """Blocks the source must have at least; None if every slice is the whole model."""
        ends = [part.layer_range[1] for part in self.slices if part.layer_range]
        return max(ends, default=None)

    def layer_map(self, num_blocks: int) -> tuple[int, ...]:
        """The block that runs at each position, of a source with `num_blocks` blocks.

        Raises PlanError with the place of a range that ends past them.
        """
        return tuple(block for _, block, _ in self._positions(num_blocks))

    def tensor_scale(self, position: int | None, name: str, num_blocks: int) -> float | None:
        """The factor mergekit multiplies a tensor by, or None where it only copies.

        position: the output layer, or None for the embedding (which follows the first slice)
            and the final norm and head (which follow the last).
        name: the tensor's name in the source, `model.layers.4.self_attn.o_proj.weight`.
        """
        if position is None:
            found = self._outer_scale(name)
        else:
            part, _, t = self._positions(num_blocks)[position]
            found = part.scale(name, t)
        return None if found is None else found[0]

    def residual_scales(self, num_blocks: int) -> tuple[tuple[float, float], ...] | None:
        """What each position's [attention, MLP] output is multiplied by before it is added to
        the residual stream; None if nothing is scaled.

        Scaling `o_proj` or `down_proj` is the same as scaling its output. Raises PlanError with
        the place of a scale on any other tensor: a folded model stores those only once.
        """
        positions = self._positions(num_blocks)
        if not any(part.scales for part in self.slices):
            return None
        for module in (EMBEDDING, FINAL_NORM, HEAD):
            name = f"{module}.weight"
            self._require_unscaled(name, self._outer_scale(name))
        scales: list[tuple[float, float]] = []
        for part, block, t in positions:
            names = {kind: f"{module_path(block, kind)}.weight" for kind in BLOCK}
            found = {kind: part.scale(name, t) for kind, name in names.items()}
            attention, mlp = found.pop(ATTENTION_OUT), found.pop(MLP_OUT)
            for kind, other in found.items():
                self._require_unscaled(names[kind], other)
            scales.append((attention[0] if attention else 1.0, mlp[0] if mlp else 1.0))
        return tuple(scales) if any(pair != (1.0, 1.0) for pair in scales) else None

    def _positions(self, num_blocks: int) -> list[tuple[Slice, int, float]]:
        """For each position its slice, its block, and how far through the slice it is."""
        bounds = [part.bounds(num_blocks) for part in self.slices]
        total = sum(end - start for start, end in bounds)
        if total > MAX_POSITIONS:
            raise PlanError(f"{self.name}: {total} positions; at most {MAX_POSITIONS} can run")
        return [
            # A slice of one layer: that is its end, as mergekit has it.
            (part, block, (block - start) / (end - start - 1) if end - start > 1 else 1.0)
            for part, (start, end) in zip(self.slices, bounds, strict=True)
            for block in range(start, end)
        ]

    def _outer_scale(self, name: str) -> tuple[float, Scale] | None:
        """For a tensor outside the blocks: mergekit takes a gradient's first value there."""
        return self.slices[0 if name == f"{EMBEDDING}.weight" else -1].scale(name, 0.0)

    def _require_unscaled(self, name: str, found: tuple[float, Scale] | None) -> None:
        if found is not None and found[0] != 1.0:
            raise PlanError(
                f"{found[1].place}: scales {name} by {found[0]:g}, which a folded model cannot "
                "express (only o_proj and down_proj); only `convert --layout unrolled` can"
            )


def interleave(num_layers: int, row: int) -> LayerPlan:
    """The model card's formula: rows of `row` layers, each starting half a row further.

    32 layers in rows of 8 are the card's own 56 positions. Raises PlanError unless half-row
    steps lead exactly to the last layer.
    """
    if row < 2 or row % 2 or row > num_layers or (num_layers - row) % (row // 2):
        raise PlanError(
            f"{num_layers} layers do not interleave in rows of {row}: the row must be even, and "
            "half-row steps must end at the last layer"
        )
    positions = 2 * num_layers - row
    if positions > MAX_POSITIONS:
        raise PlanError(f"{num_layers} layers: {positions} positions; at most {MAX_POSITIONS}")
    lines = [
        "merge_method: passthrough",
        f"# {num_layers} layers, rows of {row}, half-row steps: {positions} positions",
        "slices:",
    ]
    for start in range(0, num_layers - row + 1, row // 2):
        lines += ["- sources:", f"  - layer_range: [{start}, {start + row}]", "    model: source"]
    return LayerPlan.from_text("\n".join(lines) + "\n", f"interleave-{num_layers}-{row}")


def named_plans() -> tuple[str, ...]:
    """The names `resolve` knows without a file."""
    folder = files("mlx_cerebrum.plan") / "named"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".yml") for name in names if name.endswith(".yml")))


def resolve(name_or_path: str) -> LayerPlan:
    """A named plan, else the file of that path; `FILE#2` is the second document of a file.

    Raises PlanError listing the names if it is neither.
    """
    if name_or_path in named_plans():
        return LayerPlan.named(name_or_path)
    if _exists(name_or_path):
        return LayerPlan.from_file(name_or_path)
    file, mark, number = name_or_path.rpartition("#")
    if mark and _NUMBER.fullmatch(number) and _exists(file):
        return LayerPlan.from_file(file, int(number))
    raise PlanError(
        f"{one_line(repr(name_or_path))} is neither a file nor a named plan; {_names()}"
    )


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # a name too long for a path, or with a NUL
        return False


def _names() -> str:
    return f"named plans: {', '.join(named_plans())}"
