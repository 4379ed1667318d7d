"""What tuning gains on the bundled model, against figures measured once: a change that loses accuracy must not pass.

Forty steps on the rounding and twenty on the scales, on 32 windows of 64 tokens that the model writes itself, in
float32 on one thread. `WORST` are the worst of five seeds of the tuner: the loss of each block and the perplexity on 16
windows that no tuning sees, both tuned over rounded. Between those seeds a block's ratio moved by 0.03 at most, the
perplexity's by 0.013; `MARGIN` is half as much again. It is above noise, and below what a fault costs (see the last
test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from signround.artifact import ArtifactWriter, QuantizedCheckpoint
from signround.calibration import CalibrationTokens, load_tokenizer, self_written
from signround.evaluate import score
from signround.events import silent
from signround.pipeline import prepare
from signround.runtimes.torch_blocks import rounded_model, tuned_model
from signround.tuning.chain import TuningChain

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"
WORST = {"w2g64": ((0.371, 0.616, 0.699, 0.617), 0.190), "w4g32": ((0.567, 0.689, 0.786, 0.786), 0.967)}
MARGIN = 0.045
PERPLEXITY_MARGIN = {"w2g64": 0.04, "w4g32": 0.015}


@dataclass(frozen=True)
class Gain:
    """Tuned over rounded: the loss of each block, and the perplexity."""

    blocks: tuple[float, ...]
    perplexity: float

    def lost(self, scheme: str) -> list[str]:
        """What is worse than the worst of the five seeds by more than the margin."""
        worst, perplexity = WORST[scheme]
        found = [
            f"block {index}: {ratio:.3f}, measured {limit:.3f}"
            for index, (ratio, limit) in enumerate(zip(self.blocks, worst, strict=True))
            if ratio > limit + MARGIN
        ]
        if self.perplexity > perplexity + PERPLEXITY_MARGIN[scheme]:
            found.append(f"perplexity: {self.perplexity:.3f}, measured {perplexity:.3f}")
        return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> CalibrationTokens:
    job = prepare(EXAMPLE, "w4g32", tmp_path_factory.mktemp("job") / "out", samples=32, seqlen=64, iters=40)
    return self_written(job.checkpoint, job.plan.skipped, load_tokenizer(EXAMPLE), job.plan.tuning, silent)


def tuned(
    scheme: str, tokens: CalibrationTokens, folder: Path, fault: Mapping[str, Any] = MappingProxyType({})
) -> Gain:
    job = prepare(EXAMPLE, scheme, folder / "out", samples=32, seqlen=64, iters=40)
    # The same arithmetic on every processor: no bfloat16 where there is some.
    plan = replace(job.plan, tuning=replace(job.plan.tuning, compute="fp32", **fault))
    writer = ArtifactWriter(folder / "artifact", plan, job.checkpoint.files)
    for kept in plan.outer:
        writer.commit_outer(kept.name, job.checkpoint.read(kept.name))
    TuningChain(job.checkpoint, plan, writer, tokens.tuning, silent).run()
    artifact: QuantizedCheckpoint = writer.finish()
    writer.close()
    blocks = tuple(record.loss_tuned / record.loss_rounded for record in artifact.records())
    after, before = (
        score(model, tokens.evaluation).perplexity
        for model in (tuned_model(artifact), rounded_model(job.checkpoint, plan))
    )
    return Gain(blocks, after / before)


@pytest.mark.parametrize("scheme", WORST)
def test_tuning_gains_what_it_gained(scheme: str, tokens: CalibrationTokens, tmp_path: Path) -> None:
    assert tuned(scheme, tokens, tmp_path).lost(scheme) == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "fault"), [("w4g32", {"learning_rate": 0.0}), ("w2g64", {"start": "range"})])
def test_a_fault_is_seen(scheme: str, fault: Mapping[str, Any], tokens: CalibrationTokens, tmp_path: Path) -> None:
    """Steps on the rounding that do nothing (0.68 in the first block), and two bits without the scale search (0.46)."""
    assert tuned(scheme, tokens, tmp_path, fault).lost(scheme) != []
