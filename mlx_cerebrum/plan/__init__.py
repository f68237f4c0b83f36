"""Layer plans: mergekit YAML, formulas and named plans to a layer map."""

from mlx_cerebrum import lazily

__getattr__ = lazily(
    "mlx_cerebrum.plan.layer_plan", "LayerPlan", "interleave", "named_plans", "resolve"
)
