"""How onnxruntime-genai reads a model's tokenizer, tried out at plan time where the package is installed.

It has its own code for tokenizer.json and for chat templates (onnxruntime-extensions), which knows some splitting rules
by heart, hands others to an engine that cannot read them, and skips normalizers. So it is asked: a graph of one node
stands in for the model. Says what differs; refuses nothing, because the graph is right whatever makes the token ids.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporters.onnx.carried import TOKENIZER_CONFIG, SideFiles, write

PACKAGE = "onnxruntime_genai"
TOKENIZER = "tokenizer.json"
PROBES = (
    "Once upon a time, there was a little girl; she didn't know. It's 'quoted', we'll see!",
    "def f(x):\n    return x ** 2  # squares\n\n\n\tprint(f(3))\n",
    "12345 67,890.12 1e-10 x2y 3D ½",
    "  two leading, two trailing  \n\n",
    "CamelCaseXYZ snake_case https://example.org/a?b=c#d <tag> {json: [1]}",
    "café naïve Größe Привет 日本語のテキスト 한국어 emoji 🚀 👍🏽",
    "cafe\u0301 decomposed",
)
MESSAGES = [{"role": "user", "content": "Hello, who are you?"}]
STAND_IN: dict[str, Any] = {
    "model": {
        "type": "decoder", "context_length": 8, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0,
        "decoder": {
            "filename": "model.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1,
            "num_hidden_layers": 0, "num_key_value_heads": 1, "inputs": {"input_ids": "input_ids"},
            "outputs": {"logits": "logits"},
        },
    },
    "search": {"max_length": 8},
}  # fmt: skip


def tokenizer_notes(files: SideFiles, config_name: str) -> list[str]:
    """What onnxruntime-genai makes of the tokenizer and the chat template among `files`; nothing to say without a
    tokenizer.json, or where the package is not installed. `config_name` is what it calls its configuration."""
    if TOKENIZER not in files or find_spec(PACKAGE) is None:
        return []
    import onnxruntime_genai

    wanted = {name: files[name] for name in (TOKENIZER, TOKENIZER_CONFIG)}
    reader = f"onnxruntime-genai {version('onnxruntime-genai')}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(wanted | {config_name: json.dumps(STAND_IN)}, folder)
        _write_stand_in(folder / "model.onnx")
        try:
            tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(place))
        except RuntimeError as error:
            return [
                f"onnx: {reader} cannot load this tokenizer ({_first_line(error)}); give it token ids made elsewhere, "
                "or use transformers.js or plain onnxruntime."
            ]
        settings = json.loads((folder / TOKENIZER_CONFIG).read_text())
        notes = [*_differences(tokenizer, folder / TOKENIZER, reader)]
        if isinstance(settings.get("chat_template"), str):
            notes += _template_problem(tokenizer, reader)
    return notes


def _write_stand_in(path: Path) -> None:
    import onnx_ir as ir

    from exporters.onnx.builder import GraphBuilder

    builder = GraphBuilder()
    ids = builder.input("input_ids", ir.DataType.INT64, ["batch", "tokens"])
    (value,) = builder.op("Cast", "cast", [ids], attributes={"to": int(ir.DataType.FLOAT)})
    builder.output(value, "logits", ir.DataType.FLOAT, ["batch", "tokens"])
    ir.save(builder.model("stand_in", 21, 10, "signround", ""), path)


def _differences(tokenizer: Any, file: Path, reader: str) -> list[str]:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(file))
    different = []
    for text in PROBES:
        try:
            found = [int(token) for token in tokenizer.encode(text)]
        except RuntimeError:
            found = []
        if found != reference.encode(text, add_special_tokens=False).ids:
            different.append(text)
    if not different:
        return []
    shown = different[0] if len(different[0]) <= 24 else f"{different[0][:24]}..."
    return [
        f"onnx: {reader} makes other tokens than tokenizer.json of {len(different)} of {len(PROBES)} probe texts "
        f"({shown!r}); compare on texts of yours."
    ]


def _template_problem(tokenizer: Any, reader: str) -> list[str]:
    try:
        tokenizer.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    except RuntimeError as error:
        return [f"onnx: {reader} cannot render the chat template ({_first_line(error)}); render it elsewhere."]
    return []


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())[:160].rstrip(".")
