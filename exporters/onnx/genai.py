"""genai_config.json: how onnxruntime-genai finds the graph's inputs, its cache and the special tokens.

Source: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.rope import positions_of
from signround.plan import ModelPlan

GENERIC = "decoder"  # how onnxruntime-genai calls a language model whose family it has no name for
NAMED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite"})
CONFIG = "genai_config.json"
LONGEST = 4096  # the shared cache is allocated for this many tokens at load; a full context can be gigabytes


def genai_config(plan: ModelPlan, graph_file: str) -> dict[str, Any]:
    """The content of genai_config.json."""
    architecture = plan.architecture
    family, context = architecture.family.model_type, positions_of(architecture)
    return {
        "model": {
            "type": family if family in NAMED else GENERIC,
            **_special_tokens(plan),
            "context_length": context,
            "vocab_size": architecture.vocabulary,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graph_file,
                "head_size": architecture.head_dim,
                "hidden_size": architecture.hidden,
                "num_attention_heads": architecture.heads,
                "num_hidden_layers": architecture.layers,
                "num_key_value_heads": architecture.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": min(context, LONGEST), "past_present_share_buffer": ContribFlavour.shares_cache},
    }


def _special_tokens(plan: ModelPlan) -> dict[str, int | list[int]]:
    """bos, eos and pad ids: generation_config.json first, as transformers does; pad falls back to the first eos."""
    file = plan.files / "generation_config.json"
    generation: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found: dict[str, int | list[int]] = {}
    for kind in ("bos", "eos", "pad"):
        value = generation.get(f"{kind}_token_id")
        if value is None:
            value = plan.config.get(f"{kind}_token_id")
        if value is not None:
            found[f"{kind}_token_id"] = value
    if "eos_token_id" in found and "pad_token_id" not in found:
        ends = found["eos_token_id"]
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return found


def tokenizer_note(files: Path) -> str | None:
    """onnxruntime-genai reads tokenizer.json only; without it the folder still runs in plain onnxruntime."""
    if (files / "tokenizer.json").is_file():
        return None
    return "onnx: the model has no tokenizer.json, so onnxruntime-genai cannot load the folder; plain onnxruntime can."
