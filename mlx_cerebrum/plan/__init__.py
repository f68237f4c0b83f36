"""Layer plans: mergekit YAML, formulas and named plans to a layer map."""
