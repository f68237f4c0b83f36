"""llama.cpp's own quantizers, out of the library that its Python package carries."""

import ctypes
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from mlx_cerebrum.weights.gguf_file import GGML_TYPES

_SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}


@cache
def _library() -> ctypes.CDLL:
    files = metadata.distribution("xllamacpp").files or []
    (path,) = (file.locate() for file in files if file.name.endswith((".so", ".dylib")))
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(weights: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
    """Rows `[n, width]` -> `[n, bytes of a row]` of this type's blocks, as llama-quantize does."""
    rows, width = weights.shape
    elements, nbytes = _SIZES[kind]
    assert width % elements == 0
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.zeros((rows, width // elements * nbytes), np.uint8)
    importance = np.ones(width, np.float32)
    pointer: Any = ctypes.c_void_p
    written = _library().ggml_quantize_chunk(
        ctypes.c_int(Type[kind].value),
        pointer(weights.ctypes.data),
        pointer(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        pointer(importance.ctypes.data),
    )
    assert written == out.nbytes
    return out
