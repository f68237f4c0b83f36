"""Offline conversion: a source checkpoint to a folded or unrolled directory."""

import sys
import types

from mlx_cerebrum import Moved


class _Moved(Moved):
    PACKAGE = __name__
    ROOMS = ()
    RENAMED = types.MappingProxyType(
        {
            "arguments": "__main__",
            "gguf_stream": "gguf_export",
            "outputs": "layout",
            "sensitivity": "recipe",
        }
    )


sys.meta_path.append(_Moved())
