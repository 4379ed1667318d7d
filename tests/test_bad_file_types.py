"""What users get wrong about file types, overrides, importance matrices, parts and templates of llama.cpp: one sentence
a reason on stderr with the next step, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from signround.cli.main import main
from tests.refusals import FAST, Capture, is_refused, quantize, signround
from tests.small_models import write_small_model


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("scheme", "arguments", "parts"),
    [
        ("q4_k_n", (), ("--scheme: scheme 'q4_k_n' is not known", "did you mean q4_k_", "mobile, laptop, small")),
        ("q4_k_m", ("--to", "onnx"), ("onnx: MatMulNBits cannot hold this grid (two-level scales)", "layers.0.")),
        ("q4_k_m", ("--to", "gptq"), ("gptq: ", "is quantised, which")),
        ("w4g32", ("--to", "onnx", "--tensor-type", "lm_head=q4_1"),
         ("onnx: MatMulNBits cannot hold this grid", "integer zero point: model.embed_tokens.weight; choose")),
        ("w4g32", ("--to", "gguf", "--tensor-type", "lm_head=w3g32"),
         ("gguf: 3-bit groups", "model.embed_tokens.weight")),
        ("w4g32", ("--to", "gptq", "--tensor-type", "lm_head=w4g32"),
         ("gptq: model.embed_tokens.weight is quantised",)),
        ("w4g32", ("--to", "gptq", "--tensor-type", "attn_v=w8g32"),
         ("gptq: one file has one grid", "layers.0.self_attn.v_proj.weight and 1 more differs")),
        ("w4g32", ("--to", "gptq", "--tensor-type", r"layers\.1\.mlp=float"),
         ("gptq: loaders take every linear", "layers.1.mlp.gate_proj.weight and 2 more is kept")),
        ("q4_0", ("--to", "gguf", "--to", "onnx", "--tensor-type", "ffn_down=q6_k"),
         ("onnx: MatMulNBits cannot hold this grid (two-level scales)", "layers.0.mlp.down_proj.weight and 1 more")),
        ("w4g32", ("--tensor-type", "lm_head"), ("--tensor-type 'lm_head' is not PATTERN=TYPE",)),
        ("w4g32", ("--tensor-type", "lm_head=w8g33"), ("type 'w8g33' is not known", "w8g32", "and float")),
        ("w4g32", ("--tensor-type", "lm_haed=w8g32"),
         ("matches no matrix of this model", "token_embd, attn_q", "or embed_tokens, q_proj")),
        ("w4g32", ("--tensor-type", "lm_(=w8g32"), ("no regular expression",)),
        ("w4g32", ("--tensor-type", ".=float"), ("--tensor-type: every matrix is kept",)),
        ("w4g32", ("--tensor-type", "lm_head=q4_k"),
         ("--tensor-type: rows of 128 weights are no whole number of super-blocks", "embed_tokens.weight would need")),
        ("q4_k_m", ("--tensor-type", "ffn_down"), ("--tensor-type 'ffn_down' is not PATTERN=TYPE",)),
        ("q4_k_m", ("--tensor-type", "ffn_down=q9_k"), ("'q9_k' is not one that a tensor can have", "q6_k")),
        ("q4_k_m", ("--tensor-type", "ffn_dwn=q6_k"), ("matches no matrix of this model", "ffn_down")),
        ("q4_k_m", ("--tensor-type", "ffn_(=q6_k"), ("no regular expression",)),
        ("q4_k", (), ("--scheme: rows of 128 weights are no whole number of super-blocks", "q4_k_m with --to gguf")),
        ("q2_k_s", ("--method", "rtn"), ("q2_k_s needs an importance matrix", "take q2_k")),
        ("q4_k_m", ("--to", "onnx", "--split-max-size", "2G"), ("gguf is not exported", "--to")),
        ("q4_k_m", ("--split-max-size", "2G"), ("gguf is not exported", "--to")),
        ("q4_k_m", ("--to", "gguf", "--split-max-size", "lots"), ("split_max_size", "2G, 500M")),
        ("q4_k_m", ("--to", "gguf", "--split-max-size", "-3G"), ("split_max_size", "2G, 500M")),
        ("q4_k_m", ("--to", "gguf", "--split-max-size", "4K"), ("split_max_size is too small", "choose at least")),
        ("q4_k_m", ("--gguf-template", "nowhere.gguf"), ("gguf is not exported", "--to")),
        ("q4_k_m", ("--to", "gguf", "--gguf-template", "nowhere.gguf"), ("nowhere.gguf",)),
        ("q4_k_m", ("--to", "gguf", "--imatrix", "nowhere.dat"), ("nowhere.dat: no such importance matrix",)),
        ("q4_k_m", ("--to", "gguf", "--imatrix", "."), (".: no such importance matrix",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_file_types_and_their_flags(
    llama_folder: Path, out: Path, capsys: Capture, command: str, scheme: str, arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    effort = ("--samples", "4", "--seqlen", "16") if "rtn" in arguments else FAST
    outcome = signround(capsys, command, llama_folder, "--scheme", scheme, "-o", out, *effort, *arguments)
    is_refused(outcome, *parts, reasons=len(outcome[1]) if "--to" in arguments[:1] else 1)
    assert not out.exists()


@pytest.fixture
def imatrix(tmp_path: Path) -> Path:
    """Of a model of other widths."""
    other = write_small_model(tmp_path / "other", hidden_size=192, intermediate_size=256, num_attention_heads=3,
                              num_key_value_heads=1)  # fmt: skip
    with pytest.raises(SystemExit):
        main(["quantize", str(other), "--scheme", "w4g32", "-o", str(tmp_path / "job"), *FAST])
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "job" / "artifact"), "--to", "gguf", "-o", str(tmp_path / "gguf")])
    return tmp_path / "gguf" / "imatrix.gguf"


@pytest.mark.parametrize("method", ["rtn", "signround-400"])
def test_methods_without_an_importance_matrix(
    llama_folder: Path, out: Path, capsys: Capture, imatrix: Path, method: str
) -> None:
    outcome = quantize(capsys, llama_folder, out, "--to", "gguf", "--imatrix", imatrix, "--method", method)
    is_refused(outcome, f"--method {method} does not use an importance matrix", "leave --imatrix out")
    assert not out.exists()


def test_an_importance_matrix_that_cannot_be_used(
    llama_folder: Path, out: Path, capsys: Capture, imatrix: Path
) -> None:
    given = ("--imatrix", imatrix)
    for formats in ((), ("--to", "onnx")):
        outcome = quantize(capsys, llama_folder, out, *formats, *given)
        is_refused(outcome, "no format that was asked for reads importance matrices", "add --to gguf")
    outcome = quantize(capsys, llama_folder, out, "--to", "gguf", *given)
    is_refused(outcome, str(imatrix), "it is of another model: blk.0.attn_q.weight has 192 values, the model needs 128")
    for content in (b"", b"GGUF" + bytes(40), b"not a matrix", imatrix.read_bytes()[:-40]):
        (out.parent / "broken.gguf").write_bytes(content)
        outcome = quantize(capsys, llama_folder, out, "--to", "gguf", "--imatrix", out.parent / "broken.gguf")
        is_refused(outcome, "broken.gguf: not a usable importance matrix", "llama-imatrix")
    assert not out.exists()


def test_flags_of_a_format_that_is_not_exported(rounded_artifact: Any, out: Path, capsys: Capture) -> None:
    for flag in (("--split-max-size", "2G"), ("--gguf-template", "x.gguf")):
        outcome = signround(capsys, "export", rounded_artifact.folder, "--to", "onnx", "-o", out, *flag)
        is_refused(outcome, flag[0], "is an option of gguf, the format is onnx")
    assert not out.exists()
