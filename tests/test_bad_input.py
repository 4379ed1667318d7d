"""What users get wrong, and what the world does to them: one sentence a reason on stderr with the next step, exit code
2 (refused, nothing done) or 1 (failed, finished blocks kept), and nothing half-written under a final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from signround import artifact as artifact_room
from signround import files
from signround.artifact import QuantizedCheckpoint
from tests.refusals import FAST, Capture, half_written, is_refused, quantize, signround
from tests.small_models import write_small_model


@pytest.fixture
def model(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def change_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def damage(model: Path, change: Callable[[bytes], bytes]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def poison(model: Path, **values: float) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    for name, value in values.items():
        weights[name.replace("__", ".")].view(-1)[3] = value
    save_file(weights, path, metadata={"format": "pt"})


# ---- the model


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_missing_folder(tmp_path: Path, out: Path, capsys: Capture, command: str) -> None:
    outcome = signround(capsys, command, tmp_path / "none", "--scheme", "w4g32", "-o", out)
    is_refused(outcome, str(tmp_path / "none"), "does not exist", "give the path of a Hugging Face folder")
    assert not out.exists()


def test_a_file_in_place_of_a_folder(model: Path, out: Path, capsys: Capture) -> None:
    is_refused(quantize(capsys, model / "config.json", out), "it is a file")


def test_a_folder_without_config(model: Path, out: Path, capsys: Capture) -> None:
    (model / "config.json").unlink()
    is_refused(quantize(capsys, model, out), "has no config.json", "give the folder of a Hugging Face")
    assert not out.exists()


def test_a_pickle_checkpoint(model: Path, out: Path, capsys: Capture) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    is_refused(quantize(capsys, model, out), "pickle files (pytorch_model.bin)", "safe_serialization=True")
    assert not out.exists()


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data[:4], lambda data: b"",
                                    lambda data: data[:8] + b"!" + data[9:],
                                    lambda data: b"\xff" * 8 + data[8:]],
                         ids=["cut", "cut in the header", "empty", "corrupt header", "absurd length"])  # fmt: skip
def test_damaged_safetensors(model: Path, out: Path, capsys: Capture, change: Callable[[bytes], bytes]) -> None:
    damage(model, change)
    is_refused(quantize(capsys, model, out), "model.safetensors", "not a whole safetensors file", "download")
    assert not out.exists()


def test_nan_and_inf_name_their_tensors(model: Path, out: Path, capsys: Capture) -> None:
    poison(model, model__layers__1__mlp__up_proj__weight=float("nan"), model__norm__weight=float("inf"))
    is_refused(quantize(capsys, model, out), "model.layers.1.mlp.up_proj.weight: the weight holds NaN or Inf",
               "model.norm.weight: the weight holds NaN or Inf", reasons=2)  # fmt: skip
    assert not out.exists()


def test_an_unknown_architecture(model: Path, out: Path, capsys: Capture) -> None:
    change_config(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    is_refused(quantize(capsys, model, out), "GPT2LMHeadModel", "LlamaForCausalLM, MistralForCausalLM", "Qwen3")
    assert not out.exists()


def test_a_tokenizer_that_is_not_there(model: Path, out: Path, capsys: Capture) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    is_refused(quantize(capsys, model, out), "the tokenizer cannot be loaded", "put tokenizer.json")
    assert not out.exists()


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_a_tokenizer_that_cannot_be_carried(model: Path, out: Path, capsys: Capture, kind: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|begin|>": 0, "<|end|>": 1, "a": 2} | {f"w{i}": i for i in range(3, 512)}
    if kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    else:
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    is_refused(
        quantize(capsys, model, out, "--to", "gguf"), "signround: gguf: tokenizer.json: a tokenizer of type", kind
    )
    assert not out.exists()


# ---- the request


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--to", "coreml"), ("format 'coreml' is not known", "gguf, gptq, onnx")),
        (("--method", "awq"), ("method 'awq' is not known", "signround-400")),
        (("--recipe", "slow"), ("recipe 'slow' is not known", "fast, default, best")),
        (("--device", "tpu"), ("device 'tpu' is not known", "cpu, cuda")),
        (("--calibration", "nowhere.txt"), ("'nowhere.txt' is no file", "hub:NAME")),
        (("--set", "gguf.float_type=f16"), ("option gguf.float_type is given", "gguf is not exported; add --to gguf")),
        (("--to", "onnx", "--layout", "genai", "--set", "onnx.layout=x"), ("onnx.layout is both genai and x",)),
        (("--to", "gguf", "--set", "gguf.colour=red"), ("no option 'colour'", "float_type")),
        (("--to", "onnx", "--set", "onnx.accuracy_level=high"), ("accuracy_level needs a whole number",)),
        (("--to", "onnx", "--set", "accuracy_level=4"), ("FORMAT.OPTION=VALUE",)),
        (("--samples", "1"), ("--samples: 1 is too small",)),
        (("--seqlen", "100000"), ("exceed the model's context of 512",)),
        (("--iters", "0"), ("--iters: 0 is too small",)),
        (("--batch-size", "64"), ("64 windows a step exceed",)),
        (("--text", "nowhere.txt"), ("there is no such text file",)),
    ],
)  # fmt: skip
def test_unknown_values(
    llama_folder: Path, out: Path, capsys: Capture, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    is_refused(quantize(capsys, llama_folder, out, *arguments), *parts)
    assert not out.exists()


def test_an_unknown_scheme(llama_folder: Path, out: Path, capsys: Capture) -> None:
    is_refused(quantize(capsys, llama_folder, out, scheme="w4g33"), "'w4g33' is not known", "did you mean w4g32")


def test_an_absent_gpu(llama_folder: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_refused(quantize(capsys, llama_folder, out, "--device", "cuda"), "torch finds no CUDA device", "--device cpu")


@pytest.mark.parametrize("flag", [("--iters", "5"), ("--batch-size", "2")])
def test_flags_that_do_not_apply(llama_folder: Path, out: Path, capsys: Capture, flag: tuple[str, str]) -> None:
    outcome = quantize(capsys, llama_folder, out, "--method", "rtn", *flag)
    is_refused(outcome, "do not apply to --method rtn", "leave them out")


def test_every_reason_of_every_format_at_once(model: Path, out: Path, capsys: Capture) -> None:
    poison(model, model__norm__weight=float("nan"))
    short = out.with_name("short.txt")
    short.write_text("too short")
    code, lines, _ = quantize(
        capsys, model, out, "--to", "gguf", "--to", "gptq", "--to", "onnx", "--calibration", short, scheme="q5_1"
    )
    assert code == 2
    for subject in ("gguf", "gptq", "onnx", "model.norm.weight", "--calibration"):
        assert any(subject in line for line in lines) == (subject != "gguf"), lines  # q5_1 is a GGUF type
    assert not out.exists()


def test_a_scheme_that_a_format_cannot_hold(llama_folder: Path, out: Path, capsys: Capture) -> None:
    code, lines, _ = quantize(capsys, llama_folder, out, "--to", "gguf", "--to", "onnx", scheme="w3g64-asym")
    assert code == 2
    assert all("gguf" in line for line in lines)  # MatMulNBits holds it in a 4-bit container
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("a command is needed", "signround --help")),
        (("frobnicate",), ("no such command 'frobnicate'", "signround --help")),
        (("quantize",), ("missing argument", "signround quantize --help")),
        (("quantize", "m", "-o", "x"), ("missing option '--scheme'",)),
        (("quantize", "m", "--scheme"), ("'--scheme' requires an argument",)),
        (("quantize", "m", "--schem", "w4g32"), ("no such option: --schem", "--scheme")),
        (("quantize", "m", "extra", "--scheme", "w4g32", "-o", "x"), ("unexpected extra argument",)),
        (("quantize", "m", "--scheme", "w4g32", "-o", "x", "--iters", "many"), ("--iters", "integer")),
        (("evaluate", "m", "--text", "t", "--context", "1"), ("--context", "2")),
    ],
)
def test_usage_errors(capsys: Capture, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    code, lines, _ = signround(capsys, *arguments)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("signround: ")
    assert all(part.lower() in lines[0].lower() for part in parts), lines


# ---- calibration


def test_a_calibration_text_that_is_too_short(model: Path, out: Path, capsys: Capture) -> None:
    """And a longer one then works in the same folder."""
    text = out.with_name("text.txt")
    text.write_text("a few words only\n" * 3)
    for command in ("quantize", "plan"):
        outcome = signround(capsys, command, model, "--scheme", "w4g32", "-o", out, *FAST, "--calibration", text)
        is_refused(outcome, "tokens, 60 are needed (4 samples of 16)", "longer text")
        assert not out.exists()
    text.write_text("a few words only\n" * 50)
    assert quantize(capsys, model, out, "--calibration", text)[0] == 0


def test_a_calibration_text_in_another_encoding(model: Path, out: Path, capsys: Capture) -> None:
    text = out.with_name("text.txt")
    text.write_bytes("Größe ".encode("utf-16") * 100)
    is_refused(quantize(capsys, model, out, "--calibration", text), "not UTF-8 text", "convert it to UTF-8")
    assert not out.exists()


# ---- the output folder


def test_a_folder_that_holds_something_else(llama_folder: Path, out: Path, capsys: Capture) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    is_refused(quantize(capsys, llama_folder, out), str(out), "holds something", "choose an empty or new -o folder")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    shutil.rmtree(out)
    (out / "artifact").mkdir(parents=True)
    (out / "artifact" / "thesis.tex").write_text("precious")
    is_refused(quantize(capsys, llama_folder, out), "not a signround artifact")
    assert [path.name for path in out.rglob("*")] == ["artifact", "thesis.tex"]


def test_a_file_in_the_way(llama_folder: Path, out: Path, capsys: Capture) -> None:
    out.write_text("precious")
    is_refused(quantize(capsys, llama_folder, out), "a file of this name exists", "choose another -o folder")
    assert out.read_text() == "precious"
    out.unlink()
    (out / "artifact").mkdir(parents=True)
    (out / "onnx").write_text("precious")
    outcome = quantize(capsys, llama_folder, out, "--to", "onnx")
    is_refused(outcome, "a file is where a folder is to be written; move it away")
    assert (out / "onnx").read_text() == "precious"


@pytest.mark.parametrize("format", ["gguf", "gptq", "onnx"])
def test_an_export_removes_nothing(
    rounded_artifact: QuantizedCheckpoint, out: Path, capsys: Capture, format: str
) -> None:
    """A folder that is replaced as a whole may be the model itself, or the job."""
    command = ("export", rounded_artifact.folder, "--to", format, "-o", out)
    out.write_text("precious")
    is_refused(signround(capsys, *command), str(out), "a file of this name exists", "choose another -o folder")
    assert out.read_text() == "precious"
    out.unlink()
    out.mkdir()
    assert signround(capsys, *command)[0] == 0  # an empty one is fine
    (out / "model.safetensors").write_text("precious")
    outcome = signround(capsys, *command)
    if format == "gguf":
        assert outcome[0] == 0
    else:
        is_refused(outcome, str(out), f"{format} would replace all that it holds", "delete this one first")
    assert (out / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("other", ["scheme", "seed", "model", "calibration"])
def test_another_job_in_the_folder(model: Path, out: Path, capsys: Capture, other: str) -> None:
    assert quantize(capsys, model, out, "--method", "rtn", "--samples", "2", "--seqlen", "16")[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments: list[object] = ["--method", "rtn", "--samples", "2", "--seqlen", "16"]
    scheme = "w4g32"
    if other == "scheme":
        scheme = "w8g32"
    elif other == "seed":
        arguments += ["--seed", "1"]
    elif other == "model":
        poison(model, model__norm__weight=0.5)
    else:
        text = out.with_name("text.txt")
        text.write_text("some other words\n" * 50)
        arguments += ["--calibration", text]
    outcome = quantize(capsys, model, out, *arguments, scheme=scheme)
    mine = json.loads((out / "artifact" / "manifest.json").read_text())["plan"]
    is_refused(
        outcome, files.sha256_of_json(mine)[:12], "this one is", "another job", "choose another -o folder, or delete"
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_too_small(
    llama_folder: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(llama_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    is_refused(quantize(capsys, llama_folder, out, "--to", "gguf"), "GB are needed", "free some space")
    assert not out.exists()


# ---- what happens while it works


def full_disk_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """The function `module.name` writes its file half and then finds the disk full, from its `calls`th call on."""
    real = getattr(module, name)
    done = iter(range(1 << 30))

    def limited(path: Path, *arguments: Any) -> None:
        real(path, *arguments)
        if next(done) >= calls:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, name, limited)


def test_a_disk_that_is_full_while_tuning(
    llama_folder: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        full_disk_after(patched, artifact_room, "save_tensors", 3)  # two outer tensors and block 0 fit
        code, lines, stdout = quantize(capsys, llama_folder, out)
    assert code == 1
    assert lines[-1].startswith(f"signround: {out}/artifact/blocks/00001.safetensors: the disk is full; ")
    assert "run the same command again, finished blocks are kept." in lines[-1]
    assert stdout == ""
    assert [path.name for path in (out / "artifact" / "blocks").glob("*.safetensors")] == ["00000.safetensors"]
    assert not half_written(out)
    first = (out / "artifact" / "blocks" / "00000.safetensors").read_bytes()
    code, lines, _ = quantize(capsys, llama_folder, out)
    assert code == 0
    assert any("block 1/2  kept from an earlier run" in line for line in lines)
    assert (out / "artifact" / "blocks" / "00000.safetensors").read_bytes() == first


@pytest.mark.parametrize("format", ["gguf", "gptq", "onnx"])
def test_a_disk_that_is_full_while_exporting(
    llama_folder: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    rtn = ("--method", "rtn", "--samples", "2", "--seqlen", "16")
    assert quantize(capsys, llama_folder, out, *rtn)[0] == 0
    target = out / format

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(source: Any, destination: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("export", out / "artifact", "--to", format, "-o", target)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        patched.setattr(os, "fsync", no_space)
        code, lines, stdout = signround(capsys, *command)
    assert code == 1
    assert "the disk is full; free some space" in lines[-1]
    assert stdout == ""
    assert not [path for path in target.rglob("*") if path.is_file()]
    assert not half_written(out)
    assert signround(capsys, *command)[0] == 0
    assert [path for path in target.rglob("*") if path.is_file()]


def committed(out: Path, block: Path) -> bool:
    """Whether the manifest names the file: before that it does not exist for a resumed run."""
    manifest = out / "artifact" / "manifest.json"
    return manifest.is_file() and f"blocks/{block.name}" in manifest.read_text()


def test_ctrl_c(tmp_path: Path, capsys: Capture) -> None:
    """A real SIGINT to a real process, once the first block is committed."""
    model, out = write_small_model(tmp_path / "model", layers=4), tmp_path / "out"
    arguments = ["quantize", str(model), "--scheme", "w4g32", "-o", str(out), *FAST[:-1], "150"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "signround.cli.main", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    first = out / "artifact" / "blocks" / "00000.safetensors"
    deadline = time.monotonic() + 120
    while not committed(out, first) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        "signround: interrupted; finished blocks are kept, run the same command again to continue."
    )
    assert "Traceback" not in stderr
    assert first.exists()
    assert not (out / "artifact" / "blocks" / "00003.safetensors").exists()
    assert not half_written(out)
    code, lines, _ = signround(capsys, *arguments)
    assert code == 0
    assert any("block 1/4  kept from an earlier run" in line for line in lines)


def test_two_runs_in_one_folder(llama_folder: Path, out: Path, capsys: Capture) -> None:
    assert quantize(capsys, llama_folder, out, "--method", "rtn", "--samples", "2", "--seqlen", "16")[0] == 0
    (out / "report.json").unlink()  # or the second run would only say that all is done
    lock = artifact_room._locked(out / "artifact")
    try:
        outcome = quantize(capsys, llama_folder, out, "--method", "rtn", "--samples", "2", "--seqlen", "16")
    finally:
        lock.close()
    is_refused(outcome, "another signround run is writing to this folder", "wait for it")
