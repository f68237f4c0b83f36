"""Weights that serve several models at once, and so can't be changed any more."""

from typing import Any

import mlx.nn as nn


class SharedWeights(nn.Module):
    """A module whose weights may serve several models; then they can't be changed."""

    viewed = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_viewed()
        return super().update(*args, **kwargs)

    def update_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_viewed()
        return super().update_modules(*args, **kwargs)

    def _refuse_if_viewed(self) -> None:
        if self.viewed:
            raise RuntimeError("these weights serve several views: change them before view()")
