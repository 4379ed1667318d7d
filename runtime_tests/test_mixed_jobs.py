"""llama.cpp's file types as a user asks for them: tuned, exported, every tensor exact, and run in llama.cpp.

Small random models: tied and untied heads, q and k norms, rows that are no whole super-blocks, experts. Their logits
are flat, so the gate on top-1 is not asserted here, the mean KL is.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import signround
from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.cli.main import main
from signround.runtimes.llama_cpp import open_llama_cpp
from signround.runtimes.torch_blocks import float_model, tuned_model
from tests.small_models import write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

WHOLE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "initializer_range": 0.04,
}  # fmt: skip
NARROW = {
    "hidden_size": 192, "intermediate_size": 480, "num_attention_heads": 6, "num_key_value_heads": 2,
    "initializer_range": 0.04,
}  # fmt: skip
SLOW = ("ragged", "mobile")
LEAST_GAIN = 0.98  # of the loss of rounding to nearest, on average over the blocks


@dataclass(frozen=True)
class Case:
    """A job, and the GGUF types that its file must hold: of the matrices, by name or as a whole."""

    family: str
    scheme: str
    widths: dict[str, int | float]
    types: set[str]
    some: dict[str, str]
    arguments: tuple[str, ...] = ()


CASES = {
    "q2_k": Case("llama", "q2_k", WHOLE, {"Q2_K", "Q3_K", "Q4_K", "Q6_K"},
                 {"token_embd.weight": "Q6_K", "blk.0.attn_v.weight": "Q4_K", "blk.1.ffn_up.weight": "Q2_K"}),
    "q3_k_m": Case("qwen3", "q3_k_m", WHOLE | {"intermediate_size": 480}, {"Q3_K", "Q4_K", "Q5_K", "Q5_0", "Q6_K"},
                   {"blk.1.ffn_gate.weight": "Q3_K", "blk.0.ffn_down.weight": "Q5_0"}),
    "q4_k_m": Case("llama-untied", "Q4_K_M", WHOLE, {"Q4_K", "Q6_K", "Q8_0"},
                   {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", "blk.0.attn_q.weight": "Q8_0"},
                   ("--tensor-type", "blk.0.attn_q=q8_0")),
    "iq4_xs": Case("llama", "iq4_xs", WHOLE, {"IQ4_XS", "Q5_K", "Q6_K"}, {"blk.1.ffn_down.weight": "IQ4_XS"}),
    "mxfp4": Case("llama-untied", "mxfp4", WHOLE, {"MXFP4", "Q8_0"},
                  {"token_embd.weight": "Q8_0", "output.weight": "Q8_0", "blk.0.attn_q.weight": "MXFP4"}),
    "q8_0": Case("qwen3", "q8_0", WHOLE, {"Q8_0"}, {}),
    "ragged": Case("llama", "q4_k_m", NARROW, {"Q5_0", "Q8_0"},
                   {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q5_0", "blk.1.ffn_down.weight": "Q8_0"}),
    "mobile": Case("qwen2-moe", "mobile", WHOLE, {"Q4_0", "Q6_K"}, {"blk.0.ffn_down_exps.weight": "Q4_0"}),
}  # fmt: skip


def run_job(model: Path, case: Case, out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The command line in this process; a missed gate on a random model is exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), "--scheme", case.scheme, "--to", "gguf", "-o", str(out), "--samples", "24",
              "--seqlen", "32", "--iters", "12", "--batch-size", "4", "--split-max-size", "300K", "--json",
              *case.arguments])  # fmt: skip
    assert ended.value.code in (0, 1)
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_a_file_type_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf import GGUFReader

    case = CASES[name]
    model = write_small_model(tmp_path / "model", case.family, tokenizer="qwen2", layers=2, **case.widths)
    report = run_job(model, case, tmp_path / "out", capsys)
    export = report["exports"]["gguf"]
    artifact = QuantizedCheckpoint(tmp_path / "out" / "artifact")
    assert export["weights"]["reader"] == "independent"
    assert export["weights"]["exact"] == export["weights"]["tensors"] == len(artifact.layers) + len(artifact.kept)
    assert export["weights"]["worst_abs_difference"] == 0
    assert export["logits"]["mean_kl"] < 8e-3
    assert len(export["files"]) > 1  # parts: llama.cpp opened them by the first
    types = {
        tensor.name: tensor.tensor_type.name
        for file in export["files"]
        if file["path"].endswith(".gguf")
        for tensor in GGUFReader(tmp_path / "out" / file["path"]).tensors
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
    }
    assert set(types.values()) == case.types
    assert {key: types[key] for key in case.some} == case.some
    assert (HEAD in artifact.layers) == ("output.weight" in types)
    assert EMBEDDING in artifact.layers
    blocks = report["tuning"]["blocks"]
    gain = np.mean([block["loss_tuned"] / block["loss_rounded"] for block in blocks])
    assert gain < LEAST_GAIN, blocks
    assert (tmp_path / "out" / "gguf" / "imatrix.gguf").is_file()


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_llama_cpp_computes_what_signround_load_does(family: str, tmp_path: Path) -> None:
    """The quantised embedding and head in llama.cpp's float path are those of the artifact: its logits lie closer to
    the tuned model than those of the float model do."""
    model = write_small_model(tmp_path / "model", family, layers=2, **WHOLE)
    signround.quantize(
        model, "q5_k_m", tmp_path / "out", samples=8, seqlen=32, iters=4, tensor_types=["token_embd=q2_k"]
    )
    artifact = QuantizedCheckpoint(tmp_path / "out" / "artifact")
    target = signround.export(artifact, "gguf", tmp_path / "gguf").target
    windows = torch.randint(3, 512, (1, 32), generator=torch.Generator().manual_seed(2))
    runtime = open_llama_cpp(target, threads=1)
    try:
        found = torch.cat(list(runtime.logits(windows))).log_softmax(-1)
    finally:
        runtime.close()
    wanted = torch.cat(list(tuned_model(artifact).logits(windows))).log_softmax(-1)
    plain = torch.cat(list(float_model(SourceCheckpoint(model)).logits(windows))).log_softmax(-1)
    assert (found - wanted).norm() < 0.2 * (plain - wanted).norm()
