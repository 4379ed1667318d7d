"""Shared fixtures: small models and artifacts, written once a session. Tests that change one copy it first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from signround.artifact import QuantizedCheckpoint
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

# The same examples on every run and no time limit an example: a slow machine is not a bug.
settings.register_profile("signround", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("signround")
# Small tensors: several threads only wait for each other, twenty times slower when the processors are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of two blocks, bf16, one safetensors file."""
    return write_small_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama of two blocks in several shards."""
    return write_small_model(tmp_path_factory.mktemp("models") / "untied", "llama-untied", shard_bytes=200_000)


@pytest.fixture(scope="session")
def rounded_artifact(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """`llama_folder` at w4g32 with random flips, finished."""
    return write_rounded_artifact(llama_folder, tmp_path_factory.mktemp("artifacts") / "w4g32", "w4g32")
