"""Artifacts of small random models, rounded: what most tests of the ONNX exporter begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from signround.artifact import QuantizedCheckpoint
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., QuantizedCheckpoint]:
    """(family, scheme, changes to config.json) -> its artifact, made once."""
    made: dict[str, QuantizedCheckpoint] = {}

    def make(family: str = "llama", scheme: str = "w4g32", **overrides: Any) -> QuantizedCheckpoint:
        key = f"{family} {scheme} {overrides}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_small_model(folder / "model", family, **overrides)
            made[key] = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
        return made[key]

    return make
