"""The command line: thin doors with the library's defaults, data on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import inspect
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from signround import pipeline
from signround.artifact import QuantizedCheckpoint
from signround.cli import main as cli
from signround.cli import progress
from signround.cli.main import main
from signround.cli.progress import ProgressDisplay
from signround.events import BlockTuned, Notice, StageAdvanced, StageStarted

RTN = ("--scheme", "w4g32", "--method", "rtn", "--samples", "2", "--seqlen", "16")
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("command", "function"),
    [(cli.quantize, pipeline.quantize), (cli.plan, pipeline.prepare)],
)
def test_the_same_names_and_defaults_as_in_python(command: Any, function: Any) -> None:
    """`quantize` on the command line and `signround.quantize` are one thing."""
    renamed = {
        "setting": "options",
        "split_max_size": "options",
        "gguf_template": "options",
        "layout": "options",
        "tensor_type": "tensor_types",
    }
    inner = inspect.signature(function).parameters
    for name, parameter in inspect.signature(command).parameters.items():
        if name in ("as_json", "out") or name == "to":
            continue
        assert renamed.get(name, name) in inner, name
        if parameter.default is not inspect.Parameter.empty:
            assert (inner[renamed.get(name, name)].default or None) == (parameter.default or None), name


def test_json_is_alone_on_stdout(llama_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run(capsys, "quantize", llama_folder, *RTN, "-o", out, "--json")
    assert code == 0
    assert json.loads(stdout) == json.loads((out / "report.json").read_text())
    assert "block 2/2" in stderr
    for command in (
        ("plan", llama_folder, *RTN, "-o", tmp_path / "other"),
        ("export", out / "artifact", "--to", "gguf", "-o", tmp_path / "gguf"),
        ("inspect", out / "artifact"),
        ("schemes",),
    ):
        code, stdout, _ = run(capsys, *command, "--json")
        assert code == 0, command
        assert json.loads(stdout)


def test_text_for_people(llama_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run(capsys, "quantize", llama_folder, *RTN, "-o", out)
    assert code == 0
    assert "perplexity on" in stdout
    assert f"written to {out}: report.json, report.md, report.html" in stdout.replace("\n", "")
    code, stdout, _ = run(capsys, "export", out / "artifact", "--to", "gptq", "-o", tmp_path / "gptq")
    assert code == 0
    assert "model.safetensors" in stdout
    code, stdout, _ = run(capsys, "plan", llama_folder, *RTN)
    assert code == 0
    assert "quantised: 14, scheme w4g32" in stdout
    code, stdout, _ = run(capsys, "schemes")
    assert code == 0
    assert any(line.split() == ["w4g32", "4.500", "gguf,", "gptq,", "onnx"] for line in stdout.splitlines())
    mixes = stdout.split("embedding and head included")[1].splitlines()
    assert any(line.split()[:4] == ["q4_k_m", "4.500", "gguf", "4.5"] for line in mixes)
    assert any(line.startswith("mobile ") and "phones" in line for line in mixes)


def test_a_failed_gate_is_exit_code_1(
    llama_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signround.report.passed", lambda report: False)
    assert run(capsys, "quantize", llama_folder, *RTN, "-o", tmp_path / "out")[0] == 1


def test_problems_that_inspect_finds_are_exit_code_1(
    rounded_artifact: QuantizedCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("onnx_ir")
    target = pipeline.export(rounded_artifact.folder, "onnx", tmp_path / "onnx").target
    assert run(capsys, "inspect", target)[0] == 0
    with open(target / "model.onnx.data", "r+b") as data:
        data.truncate(5000)
    code, stdout, stderr = run(capsys, "inspect", target)
    shown = stdout.count("problem: ")
    assert code == 1
    assert shown > 1
    assert stderr == f"signround: {target} has {shown} problems; see above.\n"
    code, stdout, _ = run(capsys, "inspect", target, "--json")
    assert code == 1
    assert len(json.loads(stdout)["problems"]) == shown


def test_settings_of_formats() -> None:
    assert cli._options(["gguf.float_type=f16", "onnx.accuracy_level=0", "gguf.pre=a=b"]) == {
        "gguf": {"float_type": "f16", "pre": "a=b"}, "onnx": {"accuracy_level": "0"},
    }  # fmt: skip
    assert cli._options(None) == {}


def test_a_setting_of_another_format_is_refused(llama_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    code, _, stderr = run(
        capsys, "export", tmp_path, "--to", "gguf", "-o", tmp_path / "x", "--set", "onnx.fallback=false"
    )
    assert code == 2
    assert "--set: it names another format than gguf" in stderr


def test_progress_goes_to_stderr_line_by_line(capsys: Capture) -> None:
    with ProgressDisplay() as show:
        show(StageStarted("tune", "signround, w4g32", 2))
        show(StageAdvanced("tune", 1, 2, "half"))
        show(BlockTuned(0, 2, 1.5, 2.0, 1.0, {"mlp.up_proj.weight": "rounded", "mlp.gate_proj.weight": "tuned"}))
        show(BlockTuned(1, 2, 0.0, 2.0, 1.0, {}, resumed=True))
        show(Notice("[bold] and [/x] stay"))  # folders may be called so
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "block 1/2  loss 0.50 of rounding, 1.5 s, not tuned: mlp.up_proj" in captured.err
    assert "block 2/2  kept from an earlier run" in captured.err
    assert "[bold] and [/x] stay" in captured.err


@pytest.mark.parametrize("command", ["quantize", "plan", "export", "verify", "evaluate", "inspect", "schemes"])
def test_every_command_has_a_help_page(capsys: Capture, command: str) -> None:
    code, stdout, stderr = run(capsys, command, "--help")
    assert code == 0
    assert f"signround {command}" in stdout
    assert stderr == ""


def test_a_lost_interrupt_comes_back_with_the_next_event() -> None:
    """Raised in a callback from C, KeyboardInterrupt is printed and forgotten; the job must stop all the same."""
    progress.INTERRUPTED.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            ProgressDisplay()(Notice("anything"))
    finally:
        progress.INTERRUPTED.clear()


def stopped_in_native_code(**_: Any) -> None:
    """What an interrupt within a callback of C code may become."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")


def test_an_interrupt_that_became_another_error_is_an_interrupt(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "app", stopped_in_native_code)
    try:
        with pytest.raises(SystemExit) as ended:
            main([])
    finally:
        signal.signal(signal.SIGINT, handler)
        progress.INTERRUPTED.clear()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "signround: interrupted; finished blocks are kept, run the same command again to continue.\n"
    )


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([])
