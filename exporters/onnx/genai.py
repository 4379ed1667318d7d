"""genai_config.json: how onnxruntime-genai finds the graph's inputs, its cache and the special tokens, and how it
samples when the user says nothing (`generation`).

Its reader refuses keys that it does not know, so only known ones are written.
Source: https://onnxruntime.ai/docs/genai/reference/config.html; src/config.cpp and src/models/model_type.h of 0.18
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporters.onnx.form import GraphForm
from exporters.onnx.generation import read_generation
from exporters.onnx.rope import positions_of
from signround.plan import ModelPlan

GENERIC = "decoder"  # how onnxruntime-genai calls a language model whose family it has no name for
NAMED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite"})
LONGEST = 4096  # the shared cache is allocated for this many tokens at load; a full context can be gigabytes


def genai_config(plan: ModelPlan, graph_file: str, form: GraphForm) -> dict[str, Any]:
    """The content of genai_config.json. Raises RefusedError when the files beside the model are damaged."""
    architecture, generation = plan.architecture, read_generation(plan)
    family, context = architecture.family.model_type, positions_of(architecture)
    return {
        "model": {
            "type": family if family in NAMED else GENERIC,
            **generation.tokens,
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
        | generation.search,
    }


def tokenizer_note(files: Path) -> str | None:
    """onnxruntime-genai reads tokenizer.json only; without it the folder still runs in plain onnxruntime."""
    if (files / "tokenizer.json").is_file():
        return None
    return "onnx: the model has no tokenizer.json, so onnxruntime-genai cannot load the folder; plain onnxruntime can."
