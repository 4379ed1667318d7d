"""Tune the rounding of a language model once, ship it to llama.cpp, ONNX Runtime and GPTQ loaders, prove each file.

`signround.quantize` is the main job, as on the command line; `export`, `verify` and `load` work on its artifact.
Importing this package is light: torch and transformers are loaded by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signround.loading import load
    from signround.pipeline import export, quantize, verify

__all__ = ["export", "load", "quantize", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from signround.loading import load

        return load
    if name in __all__:
        from signround import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'signround' has no attribute {name!r}")
