"""Write a random Llama as a Hugging Face folder, one tensor in memory at a time, with the bundled model's tokenizer.

    python benchmarks/random_model.py FOLDER --layers 32 --hidden 1024

For measurements of memory and speed: the weights are noise of the usual size, the text it writes is nonsense.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "llama-4m"
HEAD_DIM = 64
SHARD_BYTES = 64 << 20


def config_of(layers: int, hidden: int, intermediate: int) -> dict[str, object]:
    """config.json: tied, grouped-query attention with a quarter of the heads, the vocabulary of the bundled model."""
    config: dict[str, object] = json.loads((TOKENIZER / "config.json").read_text())
    heads = hidden // HEAD_DIM
    return config | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": HEAD_DIM,
    }


def shapes_of(layers: int, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in model order."""
    config = config_of(layers, hidden, intermediate)
    narrow = int(str(config["num_key_value_heads"])) * HEAD_DIM
    yield "model.embed_tokens.weight", (int(str(config["vocab_size"])), hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (narrow, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (narrow, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def write_random_model(folder: Path, *, layers: int, hidden: int, intermediate: int, seed: int = 0) -> int:
    """Write the folder in bfloat16 shards of about SHARD_BYTES; returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes_of(layers, hidden, intermediate):
        if room < 0:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= 2 * math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / file, shard, generator)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(layers, hidden, intermediate), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, shape in shard:
            tensor = torch.ones(shape)
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
            stream.write(tensor.to(torch.bfloat16).view(torch.uint8).numpy().data)
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    args = parser.parse_args()
    size = write_random_model(args.folder, layers=args.layers, hidden=args.hidden, intermediate=args.intermediate)
    print(f"{args.folder}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
