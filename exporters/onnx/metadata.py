"""What the file says of itself: metadata of the ONNX model, so that a file that travels alone can be traced.

Only what decides its bytes: no times, no paths, no host. Values are text; those of several fields are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from exporters.onnx.reader import DTYPE_KEY
from signround.artifact import QuantizedCheckpoint
from signround.files import canonical_json
from signround.runtimes.ort import LEVEL_KEY


def model_metadata(artifact: QuantizedCheckpoint, options: Mapping[str, Any]) -> dict[str, str]:
    """Key -> text: scheme, bits, tuner, hashes of artifact and source, the exporter's options (flavour, dtype, ...),
    versions."""
    plan = artifact.plan
    return {
        "signround.version": version("signround"),
        "signround.scheme": plan.scheme,
        "signround.bits_per_weight": f"{plan.bits_per_weight():.4f}",  # of the quantised matrices
        "signround.architecture": plan.architecture.family.hf_class,
        "signround.tuning": canonical_json(plan.tuning.to_json()),  # method, steps, seed, ...
        "signround.calibration": canonical_json(asdict(plan.calibration)),  # kind and hash, no path
        "signround.artifact": artifact.fingerprint,
        "signround.source_sha256": plan.source_sha256,
        LEVEL_KEY: str(options["accuracy_level"]),
        DTYPE_KEY: str(options["dtype"]),
        "signround.options": canonical_json(dict(options)),
        "onnx_ir.version": version("onnx-ir"),
    }
