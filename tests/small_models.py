"""Small random models of every family, as Hugging Face folders on disk, with tokenizers trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT = [
    "The quick brown fox jumps over the lazy dog. 12345 67,890.12 + 3 = 42",
    "def f(x):\n    return x ** 2  # squares\n\nprint(f(3))\n\t\ttabs\r\n",
    "Größe, café, naïve, I'm, we'll, DON'T, 日本語のテキスト, 한국어, العربية, हिन्दी, emoji 🚀😶‍🌫️",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {
        "model_type": "llama",
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "smollm2-like": {"model_type": "llama", "hidden_size": 192, "intermediate_size": 480, "num_attention_heads": 3,
                     "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 96},
    # head_dim is not hidden / heads and query_pre_attn_scalar not head_dim; caps that bend these small logits
    "gemma2": {"model_type": "gemma2", "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
               "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
               "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 512},
    "phi4-mini-like": {
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * index for index in range(12)],
            "long_factor": [1.5 + 0.5 * index for index in range(12)],
        },
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
                "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    "qwen2-moe": {"model_type": "qwen2_moe", "tie_word_embeddings": False, "num_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160},
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 96, "num_experts": 8, "num_experts_per_tok": 3,
                  "moe_intermediate_size": 96, "norm_topk_prob": True},
    "mixtral": {"model_type": "mixtral", "tie_word_embeddings": False, "num_local_experts": 4,
                "num_experts_per_tok": 2},
}  # fmt: skip

MIXTURES = tuple(name for name, fields in FAMILIES.items() if "num_experts_per_tok" in fields)
DENSE = tuple(name for name in FAMILIES if name not in MIXTURES)


def write_small_model(  # one keyword a property that tests vary
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str = "llama3",
    shard_bytes: int | None = None,
    layers: int | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of FAMILIES) and return its folder. Vocabulary 512, hidden 128."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.08,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    fields |= FAMILIES[family] | overrides
    if layers is not None:
        fields["num_hidden_layers"] = layers
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif "norm" in name:
                parameter.uniform_(-0.5, 0.5) if "gemma" in config.model_type else parameter.uniform_(0.5, 1.5)
    model = model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    write_tokenizer(folder, tokenizer, config.vocab_size)
    return folder


def write_tokenizer(folder: Path, kind: str, vocabulary: int) -> None:
    """kind: `llama3` or `qwen2` (byte-level BPE with that split rule), `gpt2` (GPT-2's own), `llama2` (byte-fallback
    BPE as in Llama 2's tokenizer.json), each with a bos, an eos and a chat token; exactly `vocabulary` ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<|begin|>", "<|end|>", "<|chat|>"]
    if kind == "llama2":
        special = ["<s>", "</s>", "<unk>"]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special + alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        if kind == "gpt2":
            tokenizer.pre_tokenizer = byte_level
        else:
            rule = {"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}[kind]
            split = pre_tokenizers.Split(Regex(rule), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    corpus = TEXT + [f"word{i} {i * 7919} some more text number {i}" for i in range(2000)]
    tokenizer.train_from_iterator(corpus, trainer)
    missing = vocabulary - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(missing)])
    if kind in ("llama3", "llama2"):
        bos = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}<|chat|>{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
