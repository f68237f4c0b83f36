"""The two models of a comparison: one set of weights, two orders of running its blocks."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.report import public
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
    """One of the two."""

    name: str  # for the tables
    plan: LayerPlan | None  # None: the checkpoint's own order
    config: ModelConfig

    def plan_file(self, folder: Path) -> Path | None:
        """The plan as a YAML file, for a process of its own."""
        if self.plan is None:
            return None
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

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        plan_a: str | LayerPlan | None = None,
        plan_b: str | LayerPlan | None = None,
    ) -> "Pair":
        """Of 32 blocks the default sides are the two Cerebrum models; else the model as it is,
        and the model card's formula applied to it. Raises a CerebrumError for other plans than
        the model can run."""
        blocks = checkpoint.config.num_hidden_layers
        if blocks == _CARDS_BLOCKS:
            plan_a, plan_b = plan_a or "cerebrum-7b", plan_b or "cerebrum-12.25b"
        plans = plan_a, formula(blocks) if plan_b is None else plan_b
        a, b = (_side(checkpoint, plan, spec.window) for plan in plans)
        if a.name == b.name:
            raise RequestError(f"--plan-a and --plan-b are both {a.name}; give two different plans")
        return cls(Opened.of(checkpoint, replace(spec, plan=a.plan)), a, b)

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

    def flags(self, side: Side, folder: Path) -> list[str]:
        """What makes `python -m mlx_cerebrum.generate` run a side; the plan goes into `folder`."""
        packing = self.packing
        given = {
            "--model": self.path,
            "--plan": side.plan_file(folder),
            "--window": self.window,
            "--q-bits": None if packing is None else packing.bits,
        }
        return [w for flag, v in given.items() if v is not None for w in (flag, str(v))]

    def models(self) -> tuple[Model, Model]:
        """Both models over one copy of the weights, loaded at the first call.

        Raises MemoryBudgetError where they don't fit.
        """
        if self._loaded is None:
            first, other = self.opened.load(), self.b.config
            self._loaded = first, first.view(other.layer_map, other.residual_scales)
        return self._loaded

    def release(self) -> None:
        """Let go of the weights, for measurements in processes of their own."""
        self._loaded = None

    def card(self) -> dict[str, Any]:
        """What the results say about the models."""
        config, storage = self.a.config, self.storage()
        sides = {
            key: {
                "name": side.name,
                "positions": side.config.num_positions,
                "executed_parameters": side.config.executed_parameters,
                "layer_map": list(side.config.layer_map),
            }
            for key, side in zip("ab", self.sides, strict=True)
        }
        return {
            "model": public(str(self.opened.spec.name)),
            "blocks": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "parameters": config.stored_parameters,
            "window": config.sliding_window,
            "stored": config.quantization or self.checkpoint().weight_dtype,
            "loaded": str(storage.dtype).rpartition(".")[2],
            "q_bits": self.packing.bits if self.packing else None,
        } | sides


def open_pair(
    model: str,
    plan_a: str | None = None,
    plan_b: str | None = None,
    *,
    window: int | None = None,
    q_bits: int | None = None,
) -> Pair:
    """The pair over a named model; raises as `Pair.of` does."""
    spec = ModelSpec(model, q_bits=q_bits, window=window)
    return Pair.of(open_checkpoint(hub.resolve(model)), spec, plan_a, plan_b)


def _side(checkpoint: Checkpoint, given: str | LayerPlan | None, window: int | None) -> Side:
    plan = resolve(given) if isinstance(given, str) else given
    config = planned_config(checkpoint.config, plan, window)
    return Side("as it is" if plan is None else plan.name, plan, config)


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
