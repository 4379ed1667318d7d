"""What llama.cpp needs to build a model: sizes, heads, windows, multipliers, positions; and what it cannot compute.

Names and types as in gguf-py `constants.py`; the set is what llama.cpp's own converter writes for these families.
Its classes (src/models/*.cpp) compute some numbers themselves where config.json could say others: `refusals` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporters.gguf.container import KeyValue
from exporters.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from signround.architecture import Architecture
from signround.errors import Refusal
from signround.gguf_names import ARCHITECTURES
from signround.positions import Rope

ELSEWHERE = "export this model to another format, or choose another model"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EVERYWHERE = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class LlamaCppClass:
    """What one class of llama.cpp's src/models has a place for. `period` is the pattern of its sliding windows where a
    file says none (every period-th block sees everything), None where it has no windows at all. `wide_at` is the
    number of blocks at which it takes hidden / heads, not head_dim, for the scale of attention."""

    rope_kinds: tuple[str, ...]
    biases: tuple[str, ...] = QKV
    period: int | None = None
    wide_at: int | None = None


CLASSES = {
    "llama": LlamaCppClass(("default", "linear", "llama3"), EVERYWHERE),
    "qwen2": LlamaCppClass(("default", "linear")),
    "qwen3": LlamaCppClass(("default", "linear")),
    "gemma2": LlamaCppClass(("default", "linear"), period=2, wide_at=46),
    "gemma3": LlamaCppClass(("default", "linear"), period=6, wide_at=62),
    "phi3": LlamaCppClass(("default", "longrope")),
    "smollm3": LlamaCppClass(("default", "linear")),
    "granite": LlamaCppClass(("default", "linear", "llama3"), EVERYWHERE),
    "olmo2": LlamaCppClass(("default", "linear")),
    "qwen2moe": LlamaCppClass(("default", "linear")),
    "qwen3moe": LlamaCppClass(("default", "linear")),
}
# Whether llama.cpp makes the scores of the chosen experts sum to one: written into each class, no key says it.
NORMS_SCORES = {"llama": True, "qwen2moe": False, "qwen3moe": True}


def hyperparameters(architecture: Architecture) -> list[KeyValue]:
    """`{architecture}.*`: sizes, heads, norm epsilon, windows, multipliers, positions."""
    name = ARCHITECTURES[architecture.family.model_type]
    numbers = {
        "vocab_size": architecture.vocabulary,
        "context_length": architecture.context,
        "embedding_length": architecture.hidden,
        "block_count": architecture.layers,
        "feed_forward_length": architecture.intermediate,
        "attention.head_count": architecture.heads,
        "attention.head_count_kv": architecture.kv_heads,
        "attention.key_length": architecture.head_dim,
        "attention.value_length": architecture.head_dim,
        "rope.dimension_count": architecture.rope.dimensions(architecture.head_dim),
    }
    entries = [KeyValue(f"{name}.{key}", "u32", value) for key, value in (numbers | _experts(architecture)).items()]
    floats = {
        "attention.layer_norm_rms_epsilon": architecture.norm_epsilon,
        **_positions(architecture),
        **_scales(architecture),
    }
    entries += [KeyValue(f"{name}.{key}", "f32", value) for key, value in floats.items()]
    rope = architecture.rope
    if rope.kind == "linear":
        entries.append(KeyValue(f"{name}.rope.scaling.type", "string", "linear"))
    if rope.kind == "longrope":
        entries.append(KeyValue(f"{name}.rope.scaling.original_context_length", "u32", rope.original_context))
    return entries + _windows(architecture, name)


def _experts(architecture: Architecture) -> dict[str, int]:
    mixture = architecture.mixture
    if mixture is None:
        return {}
    found = {"expert_count": mixture.experts, "expert_used_count": mixture.used}
    if architecture.family.model_type != "mixtral":  # its experts are as wide as feed_forward_length
        found["expert_feed_forward_length"] = mixture.intermediate
    if mixture.shared:
        found["expert_shared_feed_forward_length"] = mixture.shared
    return found


def _positions(architecture: Architecture) -> dict[str, float]:
    rope, local = architecture.rope, _local_rope(architecture)
    found = {"rope.freq_base": rope.theta}
    if local is not None and local.theta != rope.theta:
        found["rope.freq_base_swa"] = local.theta
    if rope.kind == "linear":
        found["rope.scaling.factor"] = rope.factor
    if rope.kind == "longrope":
        found["rope.scaling.attn_factor"] = rope.attention_factor
    return found


def _scales(architecture: Architecture) -> dict[str, float]:
    scales = architecture.scales
    found = {}
    if scales.attention_cap is not None:
        found["attn_logit_softcapping"] = scales.attention_cap
    if scales.logits_cap is not None:
        found["final_logit_softcapping"] = scales.logits_cap
    if architecture.family.multipliers:
        found |= {
            "attention.scale": scales.attention,
            "embedding_scale": scales.embedding,
            "residual_scale": scales.residual,
            "logit_scale": scales.logits,
        }
    return found


def _windows(architecture: Architecture, name: str) -> list[KeyValue]:
    """The window and, where it is not llama.cpp's own, the pattern of blocks that have it."""
    widths = [window for window in architecture.windows if window is not None]
    if name == "phi3":  # llama.cpp ignores it; 0 is what its converter writes for models without one
        return [KeyValue(f"{name}.attention.sliding_window", "u32", widths[0] if widths else 0)]
    period = CLASSES[name].period
    if period is None or not widths:
        return []
    found = [KeyValue(f"{name}.attention.sliding_window", "u32", widths[0])]
    pattern = [window is not None for window in architecture.windows]
    if pattern != [(index + 1) % period != 0 for index in range(architecture.layers)]:
        found.append(KeyValue(f"{name}.attention.sliding_window_pattern", "bool", pattern))
    return found


def _local_rope(architecture: Architecture) -> Rope | None:
    """The positions of windowed blocks, where a family has them apart."""
    if not architecture.family.local_rope:
        return None
    pairs = zip(architecture.windows, architecture.ropes, strict=True)
    return next((rope for window, rope in pairs if window is not None), None)


def rope_tensors(architecture: Architecture) -> dict[str, npt.NDArray[np.float32]]:
    """Divisors of the rotary frequencies that a file holds as tensors, float32 [rotating values / 2]: one for Llama 3's
    scaling, a long and a short one for longrope, none for the other kinds."""
    rope = architecture.rope
    factors = rope_factors(rope, architecture.head_dim)
    if factors is not None:
        return {ROPE_FACTORS: factors}
    if rope.kind == "longrope":
        return {
            LONG_FACTORS: np.array(rope.long_factors, np.float32),
            SHORT_FACTORS: np.array(rope.short_factors, np.float32),
        }
    return {}


def rope_factors(rope: Rope, head_dim: int) -> npt.NDArray[np.float32] | None:
    """Divisors of the rotary frequencies for Llama 3's scaling, float32 [head_dim / 2]; None for the other kinds.

    Long wavelengths are slowed by `factor`, short ones are kept, those between are interpolated (transformers
    `_compute_llama3_parameters`).
    """
    if rope.kind != "llama3":
        return None
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope.original_context * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope.factor + smooth)).astype(np.float32)


def refusals(architecture: Architecture) -> list[Refusal]:
    """Every reason why llama.cpp would compute something else."""
    if architecture.family.model_type not in ARCHITECTURES:
        problem = f"{architecture.family.hf_class} is not written to GGUF"
        return [Refusal(problem, ELSEWHERE, "gguf")]
    name = ARCHITECTURES[architecture.family.model_type]
    problems = [rule(architecture, name) for rule in _RULES]
    return [Refusal(problem, ELSEWHERE, "gguf") for problem in problems if problem is not None]


def _bias(architecture: Architecture, name: str) -> str | None:
    homeless = sorted(architecture.biased - set(CLASSES[name].biases))
    return f"llama.cpp's {name} has no place for biases of {', '.join(homeless)}" if homeless else None


def _rope_kind(architecture: Architecture, name: str) -> str | None:
    local = _local_rope(architecture)
    if architecture.rope.kind not in CLASSES[name].rope_kinds:
        return f"llama.cpp's {name} has no rope scaling {architecture.rope.kind!r}"
    if local is not None and local.kind != "default":
        return f"llama.cpp's {name} has no rope scaling {local.kind!r} in windowed blocks"
    return None


def _attention_scale(architecture: Architecture, name: str) -> str | None:
    if not architecture.family.query_scalar:
        return None
    wide = architecture.layers == CLASSES[name].wide_at
    theirs = (architecture.hidden // architecture.heads if wide else architecture.head_dim) ** -0.5
    if math.isclose(theirs, architecture.scales.attention, rel_tol=1e-6):
        return None
    return (
        f"llama.cpp's {name} of {architecture.layers} blocks scales attention by {theirs:.6g}, "
        f"config.json says {architecture.scales.attention:.6g} (query_pre_attn_scalar)"
    )


def _caps(architecture: Architecture, name: str) -> str | None:
    missing = None in (architecture.scales.attention_cap, architecture.scales.logits_cap)
    return "llama.cpp's gemma2 always caps scores and logits, config.json does not" if missing else None


def _head_width(architecture: Architecture, name: str) -> str | None:
    theirs = architecture.hidden // architecture.heads
    if name not in ("phi3", "olmo2", "qwen2moe") or theirs == architecture.head_dim:
        return None
    return f"llama.cpp's {name} has heads of hidden / heads = {theirs} values, config.json says {architecture.head_dim}"


def _head(architecture: Architecture, name: str) -> str | None:
    if name == "gemma2" and not architecture.tied:
        return "llama.cpp's gemma2 takes the embedding for its head, this model has a head of its own"
    if name in ("olmo2", "qwen2moe") and architecture.tied:
        return f"llama.cpp's {name} needs a head of its own, this model's is its embedding"
    return None


def _unrotated(architecture: Architecture, name: str) -> str | None:
    rotated = [rope is not None for rope in architecture.ropes]
    theirs = [name != "smollm3" or (index + 1) % 4 != 0 for index in range(architecture.layers)]
    if rotated == theirs:
        return None
    return f"llama.cpp's {name} has fixed blocks without positions (every fourth in smollm3), config.json says others"


def _zeros(architecture: Architecture, name: str) -> str | None:
    scales = architecture.scales
    zero = 0.0 in (scales.attention, scales.embedding, scales.residual, scales.logits)
    return "llama.cpp takes a multiplier of 0 for none" if zero else None


def _scores(architecture: Architecture, name: str) -> str | None:
    mixture = architecture.mixture
    if mixture is None or mixture.norms_scores == NORMS_SCORES[name]:
        return None
    theirs, ours = ("always", "false") if NORMS_SCORES[name] else ("never", "true")
    return f"llama.cpp's {name} {theirs} makes the scores of a token's experts sum to one, norm_topk_prob is {ours}"


_RULES: tuple[Callable[[Architecture, str], str | None], ...] = (
    _bias,
    _rope_kind,
    _attention_scale,
    lambda architecture, name: _caps(architecture, name) if name == "gemma2" else None,
    _head_width,
    _head,
    _unrotated,
    _zeros,
    _scores,
)


def notes(architecture: Architecture) -> list[str]:
    """What llama.cpp does otherwise in long texts."""
    name = ARCHITECTURES[architecture.family.model_type]
    found = []
    windows = [window for window in architecture.windows if window is not None]
    if windows and CLASSES[name].period is None and min(windows) < architecture.context:
        found.append(
            f"gguf: llama.cpp ignores the sliding window of {architecture.family.hf_class}; up to "
            f"{min(windows)} tokens nothing changes, in longer texts every block sees everything"
        )
    rope = architecture.rope
    if rope.kind == "longrope" and rope.original_context < architecture.context:
        found.append(
            f"gguf: llama.cpp takes the long rope factors when its context is set above {rope.original_context} "
            "tokens, transformers when a text is longer than that; shorter texts differ in such a context"
        )
    return found
