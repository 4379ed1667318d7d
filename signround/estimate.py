"""What a job will take: sizes from shapes, memory from the stages, time from a short measurement of this machine."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from signround.artifact import artifact_bytes
from signround.calibration import EVALUATION_WINDOWS, cache_bytes, writing_batch
from signround.experts import is_expert
from signround.pipeline import Job
from signround.plan import ModelPlan
from signround.recipes import hidden_copies
from signround.runtimes.torch_blocks import LOGIT_BYTES
from signround.tuning.ahead import LOGIT_BYTES as AHEAD_LOGIT_BYTES
from signround.tuning.chain import LEAST_EXPERT_TOKENS

GIB = 1 << 30


def describe(job: Job) -> dict[str, Any]:
    """The resolved plan as JSON values: what becomes of every tensor, settings, sizes, memory, time, notes."""
    plan = job.plan
    return {
        "model": plan.model,
        "architecture": plan.architecture.family.hf_class,
        "parameters": plan.parameters,
        "scheme": plan.scheme,
        "bits_per_weight": plan.bits_per_weight(),
        "fingerprint": plan.fingerprint,
        "tuning": plan.tuning.to_json(),
        "calibration": {"source": job.calibration, "tokens": plan.tuning.samples * plan.tuning.seqlen},
        "quantized": [
            {
                "name": layer.name,
                "shape": [layer.rows, layer.columns],
                "grid": layer.grid.to_json(),
                "reason": layer.reason,
            }
            for layer in plan.layers()
        ],
        "kept": [
            {"name": kept.name, "shape": list(kept.shape), "dtype": kept.dtype, "reason": kept.reason}
            for kept in plan.kept()
        ],
        "skipped": dict(plan.skipped),
        "bytes": {
            "artifact": artifact_bytes(plan),
            **{exporter.name: exporter.estimated_bytes(plan) for exporter in job.exporters},
        },
        "memory_bytes": memory_bytes(job),
        "seconds": tuning_seconds(job),
        "notes": [
            *job.notes,
            *_expert_notes(plan),
            *(note for exporter in job.exporters for note in exporter.notes(plan)),
        ],
    }


def _expert_notes(plan: ModelPlan) -> list[str]:
    mixture, tuning = plan.architecture.mixture, plan.tuning
    if mixture is None or tuning.method == "rtn":
        return []
    average = tuning.samples * tuning.seqlen * mixture.used // mixture.experts
    return [
        f"experts: {mixture.used} of {mixture.experts} see each token, about {average} calibration tokens an expert; "
        f"those that fewer than {LEAST_EXPERT_TOKENS} reach are rounded, not tuned, and the report names them"
    ]


def memory_bytes(job: Job) -> dict[str, int]:
    """Peak of each stage on the host, the interpreter (about 0.5 GB) included; within 1.5 of what is measured
    (benchmarks/memory.py). None but `calibrate` with text that the model writes itself grows with the blocks."""
    plan, base = job.plan, GIB // 2
    layer = max(layer.rows * layer.columns for layer in plan.layers())
    outer = max(math.prod(kept.shape) * kept.torch_dtype.itemsize for kept in plan.outer)
    return {
        "calibrate": base + (_writing_bytes(job) if plan.calibration.source == "self" else 0),
        "tune": base + (layer * 32 if plan.tuning.method == "rtn" else 0) + _tuning_bytes(plan),
        "evaluate": base + _evaluation_bytes(plan, layer),
        "export": base + 2 * max(outer, 4 * layer),
    }


def _block_weights(plan: ModelPlan) -> int:
    """Of the quantised linears of a block."""
    return max(sum(layer.rows * layer.columns for layer in block.layers) for block in plan.blocks)


def _block_elements(plan: ModelPlan) -> int:
    """Of all tensors of a block, quantised or not."""
    return max(
        sum(layer.rows * layer.columns for layer in block.layers) + sum(math.prod(kept.shape) for kept in block.kept)
        for block in plan.blocks
    )


def _activation_bytes(plan: ModelPlan, windows: int) -> int:
    """What one block keeps of some windows, float32; experts keep a copy of their tokens each."""
    architecture = plan.architecture
    copies = 3 * architecture.mixture.used if architecture.mixture else 0
    widths = (12 + copies) * architecture.hidden + 6 * architecture.active_intermediate
    if architecture.scales.attention_cap is not None:  # scores are written out: product, cap, mask, softmax
        widths += 6 * architecture.heads * plan.tuning.seqlen
    return windows * plan.tuning.seqlen * widths * 4


def _tuning_bytes(plan: ModelPlan) -> int:
    if plan.tuning.method == "rtn":
        return _block_weights(plan)  # the codes of a block; beside them one layer is being rounded
    hidden = plan.tuning.samples * plan.tuning.seqlen * plan.architecture.hidden
    hidden *= {"fp32": 4, "bf16": 2}[plan.tuning.hidden_states] * hidden_copies(plan.tuning)
    # weight, V, its best copy, gradients and the chain of the fake quantiser: about twelve float32 a weight
    tuned = 12 * 4 * _block_weights(plan) + hidden + _activation_bytes(plan, plan.tuning.batch_size)
    if not plan.tuning.lookahead:
        return tuned
    kept = 4 + (2 if plan.tuning.compute == "bf16" else 0)  # autocast's copy waits for the backward pass
    following = kept * _block_elements(plan) + _activation_bytes(plan, plan.tuning.batch_size)
    head = kept * plan.architecture.vocabulary * plan.architecture.hidden + 4 * AHEAD_LOGIT_BYTES
    return tuned + max(following, head)


def _evaluation_bytes(plan: ModelPlan, layer: int) -> int:
    """A float32 block, one layer being rounded or decoded, the head, a batch of logits and their probabilities."""
    window = plan.tuning.seqlen * plan.architecture.vocabulary * 4
    logits = min(EVALUATION_WINDOWS * window, max(LOGIT_BYTES, window)) + 3 * window
    head = plan.architecture.vocabulary * plan.architecture.hidden * 4
    return 4 * _block_elements(plan) + 16 * layer + head + logits + _activation_bytes(plan, 8) // 2


def _writing_bytes(job: Job) -> int:
    """The whole model in its own dtype, the key-value cache and what it is copied to, logits and probabilities."""
    architecture, seqlen = job.plan.architecture, job.plan.tuning.seqlen
    batch = writing_batch(architecture, seqlen)
    weights = sum(info.bytes for info in job.checkpoint.tensors.values())
    return weights + 2 * batch * cache_bytes(architecture, seqlen) + 4 * batch * architecture.vocabulary * 4


def tuning_seconds(job: Job) -> float:
    """Floor of the tuning time: the arithmetic of the block's own passes at the matrix speed measured just now."""
    plan = job.plan
    mixture = plan.architecture.mixture
    routed = mixture.used / mixture.experts if mixture else 1.0
    weights = sum(layer.rows * layer.columns * (routed if is_expert(layer.name) else 1.0) for layer in plan.layers())
    # forward, and backward to weights and inputs; through what follows, forward and backward to its inputs
    per_token = (10 if plan.tuning.lookahead else 6) * weights
    if plan.tuning.lookahead:
        per_token += 6 * plan.architecture.vocabulary * plan.architecture.hidden
    count = plan.tuning.iters + plan.tuning.scale_iters
    steps = count * plan.tuning.batch_size * plan.tuning.seqlen * per_token
    passes = 3 * plan.tuning.samples * plan.tuning.seqlen * 2 * weights if plan.tuning.iters else 0
    return (steps + passes) / _matrix_speed(plan.tuning.device, plan.tuning.compute, plan.architecture.hidden)


def _matrix_speed(device: str, compute: str, hidden: int) -> float:
    """Operations a second of one matrix product of the model's width."""
    import torch

    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    tokens = 4096 if device == "cuda" else 512
    left = torch.randn(tokens, hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    for _ in range(2):
        left @ right
    repeats = 5
    started = time.perf_counter()
    for _ in range(repeats):
        result = left @ right
    result.sum().item()
    return repeats * 2 * tokens * hidden * 4 * hidden / (time.perf_counter() - started)


def describe_lines(description: Mapping[str, Any]) -> list[str]:
    """The plan for a person."""
    tuning = description["tuning"]
    then = f", then {tuning['scale_iters']} on the scales" if tuning["scale_iters"] else ""
    reasons = Counter(entry["reason"] for entry in description["quantized"])
    kept = Counter(entry["reason"] for entry in description["kept"])
    lines = [
        f"{description['model']}: {description['architecture']}, {description['parameters'] / 1e6:.1f} M parameters",
        f"scheme {description['scheme']}, {description['bits_per_weight']:.3f} bits a weight in the quantised matrices",
        *(f"  quantised: {count}, {reason}" for reason, count in reasons.items()),
        *(f"  kept: {count}, {reason}" for reason, count in kept.items()),
        *(f"  skipped {name}: {reason}" for name, reason in description["skipped"].items()),
        f"{tuning['method']} on {tuning['device']} ({tuning['compute']} products): {tuning['iters']} steps a block"
        f"{then}, batch {tuning['batch_size']}, {tuning['samples']} samples of {tuning['seqlen']} tokens, "
        f"{tuning['held_out']} held out, from {description['calibration']['source']}"
        f"{', looking one block ahead' if tuning['lookahead'] else ''}",
        "sizes: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in description["bytes"].items()),
        "peak memory: "
        + ", ".join(f"{stage} {size / 1e9:.1f} GB" for stage, size in description["memory_bytes"].items()),
        f"time: about {description['seconds']:.0f} s of arithmetic for tuning on this machine",
        f"fingerprint {description['fingerprint']}",
    ]
    return [*lines, *(f"note: {note}" for note in description["notes"])]
