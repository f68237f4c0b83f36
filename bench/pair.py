"""The two models of a comparison: one set of weights, two orders of running its blocks."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.random_model import RandomCheckpoint
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan, interleave, resolve
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_checkpoint, planned_config
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import Storage

_CARDS_BLOCKS = 32  # what the plans of the two Cerebrum models are written for


@dataclass(frozen=True)
class Side:
    """One of the two: a name for the tables, and its layer plan (None: the checkpoint's order)."""

    name: str
    plan: LayerPlan | None

    def config(self, checkpoint: Checkpoint, window: int | None = None) -> ModelConfig:
        return planned_config(checkpoint.config, self.plan, window)

    def plan_file(self, folder: Path) -> Path:
        """The plan as a YAML file, for a process of its own."""
        if self.plan is None:
            raise RequestError(f"{self.name} is the checkpoint's own order: it has no plan file")
        path = folder / f"{self.name}.yml"
        path.write_text(self.plan.text, encoding="utf-8")
        return path


@dataclass
class Pair:
    """Two sides over one checkpoint. No weight is read before `models` is called."""

    opened: Opened  # as side a runs it
    a: Side
    b: Side
    _loaded: tuple[Model, Model] | None = field(default=None, repr=False)

    @property
    def model(self) -> str:
        """As the user named it."""
        return str(self.opened.spec.name)

    @property
    def path(self) -> Path:
        return self.checkpoint().path

    @property
    def window(self) -> int | None:
        """What overrides the checkpoint's; 0: full attention."""
        return self.opened.spec.window

    @property
    def packing(self) -> Packing | None:
        """For dense weights on the way in."""
        return self.opened.spec.packing

    @property
    def names(self) -> tuple[str, str]:
        return self.a.name, self.b.name

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.a, self.b

    def checkpoint(self) -> Checkpoint:
        return self.opened.checkpoint

    def storage(self) -> Storage:
        """How `models` holds the weights."""
        return self.opened.storage

    def tokenizer(self) -> Tokenizer | None:
        """None for a checkpoint that has none, as one of random weights."""
        try:
            return self.opened.tokenizer
        except CerebrumError:
            return None

    def models(self) -> tuple[Model, Model]:
        """Both models over one copy of the weights, loaded at the first call.

        Raises MemoryBudgetError where they don't fit.
        """
        if self._loaded is None:
            first, other = self.opened.load(), self.b.config(self.checkpoint(), self.window)
            self._loaded = first, first.view(other.layer_map, other.residual_scales)
        return self._loaded

    def release(self) -> None:
        """Let go of the weights, for measurements in processes of their own."""
        self._loaded = None

    def card(self) -> dict[str, Any]:
        """What the results say about the models."""
        checkpoint = self.checkpoint()
        sides = {}
        for key, side in zip("ab", self.sides, strict=True):
            config = side.config(checkpoint, self.window)
            sides[key] = {
                "name": side.name,
                "positions": config.num_positions,
                "executed_parameters": config.executed_parameters,
                "layer_map": list(config.layer_map),
            }
        config = (
            checkpoint.config if self.window is None else self.a.config(checkpoint, self.window)
        )
        return {
            "model": shown(self.model),
            "blocks": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "parameters": config.stored_parameters,
            "window": config.sliding_window,
            "stored": config.quantization or checkpoint.weight_dtype,
            "loaded": str(self.storage().dtype).rpartition(".")[2],
            "q_bits": self.packing.bits if self.packing else None,
        } | sides


def shown(model: str) -> str:
    """A model's name for a report others read: a path's last part, a hub id whole."""
    return Path(model).name if os.sep in model and Path(model).exists() else model


def open_pair(
    model: str,
    plan_a: str | None = None,
    plan_b: str | None = None,
    *,
    window: int | None = None,
    q_bits: int | None = None,
) -> Pair:
    """The pair of `python -m bench`; raises a CerebrumError for plans the model can't run.

    Of a model of 32 blocks the default sides are the two Cerebrum models; of another the model
    as it is, and the model card's formula applied to it.
    """
    checkpoint = open_checkpoint(hub.resolve(model))
    return _pair(checkpoint, ModelSpec(model, q_bits=q_bits, window=window), plan_a, plan_b)


def random_pair(
    plan_a: str | None = None, plan_b: str | None = None, q_bits: int | None = None
) -> Pair:
    """The pair over random weights of the 7B's exact geometry, made in memory: no file."""
    checkpoint = RandomCheckpoint(Path("random-7b"))
    return _pair(checkpoint, ModelSpec(checkpoint.path, q_bits=q_bits), plan_a, plan_b)


def _pair(checkpoint: Checkpoint, spec: ModelSpec, plan_a: str | None, plan_b: str | None) -> Pair:
    a, b = _sides(checkpoint, plan_a, plan_b)
    b.config(checkpoint, spec.window)  # a plan for other blocks is refused here
    return Pair(Opened.of(checkpoint, replace(spec, plan=a.plan)), a, b)


def _sides(checkpoint: Checkpoint, plan_a: str | None, plan_b: str | None) -> tuple[Side, Side]:
    blocks = checkpoint.config.num_hidden_layers
    cards = blocks == _CARDS_BLOCKS
    a = _side(plan_a, LayerPlan.named("cerebrum-7b") if cards else None)
    b = _side(plan_b, LayerPlan.named("cerebrum-12.25b") if cards else formula(blocks))
    if a.name == b.name:
        raise RequestError(f"--plan-a and --plan-b are both {a.name}; give two different plans")
    return a, b


def formula(blocks: int) -> LayerPlan:
    """The 12.25B's plan for any number of blocks: rows of a quarter of them, half-row steps.

    Where a quarter does not come out even, the next wider row that does, else the next narrower.
    Of 32 blocks that is the 12.25B itself. Raises RequestError for fewer than 3 blocks.
    """
    halves = [half for half in range(1, -(-blocks // 2)) if blocks % half == 0]
    if not halves:
        raise RequestError(f"{blocks} blocks do not interleave; give --plan-b")
    wide = [half for half in halves if 8 * half >= blocks]
    return interleave(blocks, 2 * (wide[0] if wide else halves[-1]))


def _side(given: str | None, default: LayerPlan | None) -> Side:
    plan = default if given is None else resolve(given)
    return Side("as it is" if plan is None else plan.name, plan)
