"""genai_config.json: how onnxruntime-genai finds the graph's inputs, its cache and the special tokens, and how it
samples when the user says nothing.

Its reader refuses keys that it does not know, so only known ones are written.
Source: https://onnxruntime.ai/docs/genai/reference/config.html; src/config.cpp and src/models/model_type.h of 0.18
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.onnx.form import GraphForm
from exporters.onnx.rope import positions_of
from signround.plan import ModelPlan

GENERIC = "decoder"  # how onnxruntime-genai calls a language model whose family it has no name for
NAMED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite"})
CONFIG = "genai_config.json"
LONGEST = 4096  # the shared cache is allocated for this many tokens at load; a full context can be gigabytes
# Keys of generation_config.json that onnxruntime-genai knows under `search`, with their types there.
SAMPLING: dict[str, type[bool] | type[int] | type[float]] = {
    "do_sample": bool, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float,
    "no_repeat_ngram_size": int, "min_length": int,
}  # fmt: skip
TRANSFORMERS_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}  # where generation_config.json says do_sample only


def genai_config(plan: ModelPlan, graph_file: str, form: GraphForm) -> dict[str, Any]:
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
                "session_options": {"provider_options": [], **form.session_options},
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
        "search": {"max_length": min(context, LONGEST), "past_present_share_buffer": form.operators.shares_cache}
        | _sampling(plan),
    }


def _special_tokens(plan: ModelPlan) -> dict[str, int | list[int]]:
    """bos, eos and pad ids: generation_config.json first, as transformers does; pad falls back to the first eos."""
    generation = _generation(plan)
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


def _generation(plan: ModelPlan) -> dict[str, Any]:
    file = plan.files / "generation_config.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _sampling(plan: ModelPlan) -> dict[str, Any]:
    """How the model's publisher wants it sampled; greedy where nothing is said, as in transformers."""
    given: dict[str, Any] = {key: value for key, value in _generation(plan).items() if value is not None}
    defaults: dict[str, Any] = TRANSFORMERS_SAMPLING if given.get("do_sample") else {"do_sample": False}
    return defaults | {key: kind(given[key]) for key, kind in SAMPLING.items() if key in given}


def tokenizer_note(files: Path) -> str | None:
    """onnxruntime-genai reads tokenizer.json only; without it the folder still runs in plain onnxruntime."""
    if (files / "tokenizer.json").is_file():
        return None
    return "onnx: the model has no tokenizer.json, so onnxruntime-genai cannot load the folder; plain onnxruntime can."
