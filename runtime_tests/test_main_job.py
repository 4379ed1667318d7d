"""The main job as a user runs it: the command line, all three formats, the real runtimes, and every other command on
what it wrote. One job of a random Qwen3 (gates that need a trained model are judged on the bundled one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from signround.cli.main import main
from tests.small_models import write_small_model

for runtime in ("onnxruntime", "xllamacpp", "gptqmodel"):
    pytest.importorskip(runtime)

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"
FORMATS = ("gguf", "onnx", "gptq")
SETTINGS = ("--samples", "8", "--seqlen", "64", "--iters", "4")
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Finished:
    """A job of the command line in its own process."""

    out: Path
    code: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout))


def run_job(model: Path, out: Path) -> Finished:
    command = ["quantize", str(model), "--scheme", "w4g32", "-o", str(out), *SETTINGS, "--json"]
    for name in FORMATS:
        command += ["--to", name]
    process = subprocess.run(
        [sys.executable, "-m", "signround.cli.main", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Finished(out, process.returncode, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The bundled model, trained, so that the gates mean something."""
    return run_job(EXAMPLE, tmp_path_factory.mktemp("job") / "out")


def signround(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Exit code and stdout of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_the_job_succeeds(finished: Finished) -> None:
    assert finished.code == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "block 4/4" in finished.stderr  # progress goes there


def test_the_report_keeps_its_schema(finished: Finished) -> None:
    """Every field of schema 1 that others rely on; and stdout is the very report on disk."""
    report = finished.report
    assert report == json.loads((finished.out / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["model"].keys() >= {"path", "sha256", "architecture", "parameters"}
    assert report["calibration"].keys() >= {"source", "tokens", "sha256"}
    assert report["tuning"].keys() >= {"seconds", "peak_rss_bytes", "peak_device_bytes", "blocks"}
    for block in report["tuning"]["blocks"]:
        assert block.keys() >= {"index", "seconds", "loss_rounded", "loss_tuned", "kept"}
        assert block["loss_tuned"] <= block["loss_rounded"]
    assert report["perplexity"].keys() >= {"text", "tokens", "float", "rounded", "tuned"}
    assert report.keys() >= {"scheme", "recipe", "versions"}
    assert report["exports"].keys() == set(FORMATS)
    for export in report["exports"].values():
        assert export.keys() >= {"files", "bits_per_weight", "weights", "logits", "perplexity", "speed"}
        assert export["weights"].keys() >= {"tensors", "exact", "worst_abs_difference"}
        assert export["logits"].keys() >= {
            "runtime", "tokens", "mean_kl", "top1_agreement", "max_abs_difference", "passed"
        }  # fmt: skip
        assert export["speed"] is None or export["speed"].keys() >= {
            "prefill_tokens_per_second", "decode_tokens_per_second"
        }  # fmt: skip
        for file in export["files"]:
            assert (finished.out / file["path"]).stat().st_size == file["bytes"]
    assert report["exports"]["gguf"]["speed"]["decode_tokens_per_second"] > 0


def test_every_file_is_the_tuned_model(finished: Finished) -> None:
    for name, export in finished.report["exports"].items():
        weights = export["weights"]
        assert weights["reader"] == "independent", name
        assert weights["exact"] == weights["tensors"] > 28
        assert weights["worst_abs_difference"] == 0
        assert export["logits"]["passed"], (name, export["logits"])
        assert export["passed"]


def test_reports_for_people(finished: Finished) -> None:
    text = (finished.out / "report.md").read_text()
    page = (finished.out / "report.html").read_text()
    for part in (*FORMATS, "passed", "perplexity"):
        assert part in text
        assert part in page
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


@pytest.mark.parametrize("name", FORMATS)
def test_verify(finished: Finished, capsys: Capture, name: str) -> None:
    target = finished.out / finished.report["exports"][name]["target"]
    code, stdout = signround(capsys, "verify", target, "--artifact", finished.out / "artifact", "--json")
    verdict = json.loads(stdout)
    assert code == 0
    assert verdict["passed"]
    assert verdict["weights"]["exact"] == finished.report["exports"][name]["weights"]["exact"]


def test_verify_catches_another_model(finished: Finished, tmp_path: Path, capsys: Capture) -> None:
    """A file of another seed is a fine file, but not this model: exit code 1 and the tensors by name."""
    other = tmp_path / "other"
    code, _ = signround(
        capsys, "quantize", EXAMPLE, "--scheme", "w4g32", "--method", "rtn", "--samples", "2", "--seqlen", "64",
        "-o", other,
    )  # fmt: skip
    assert code == 0
    assert signround(capsys, "export", other / "artifact", "--to", "onnx", "-o", tmp_path / "onnx")[0] == 0
    code, stdout = signround(capsys, "verify", tmp_path / "onnx", "--artifact", finished.out / "artifact")
    assert code == 1
    assert "model.layers.0.mlp.up_proj.weight differs" in stdout
    assert "FAILED" in stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["artifact", *FORMATS])
def test_inspect(finished: Finished, capsys: Capture, name: str) -> None:
    target = finished.out / "artifact"
    if name != "artifact":
        target = finished.out / finished.report["exports"][name]["target"]
    code, stdout = signround(capsys, "inspect", target, "--json")
    assert code == 0
    assert sum(grid["linears"] for grid in json.loads(stdout)["grids"]) == 28
    assert signround(capsys, "inspect", target)[0] == 0


def test_export_gives_the_same_bytes(finished: Finished, tmp_path: Path, capsys: Capture) -> None:
    code, stdout = signround(
        capsys, "export", finished.out / "artifact", "--to", "gguf", "-o", tmp_path / "again", "--json"
    )
    assert code == 0
    exported = json.loads(stdout)
    (ours,) = (path for path in (finished.out / "gguf").glob("*.gguf") if path.name != "imatrix.gguf")
    assert Path(exported["target"]).read_bytes() == ours.read_bytes()


def test_evaluate(finished: Finished, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived near the sea.\n" * 20)
    code, stdout = signround(
        capsys, "evaluate", finished.out / "onnx", "--text", text, "--reference", finished.out / "artifact",
        "--context", "64", "--json",
    )  # fmt: skip
    measured = json.loads(stdout)
    assert code == 0
    assert measured.keys() >= {"perplexity", "tokens", "mean_kl", "top1_agreement"}
    assert measured["mean_kl"] < 1e-2
    code, stdout = signround(capsys, "evaluate", finished.out / "artifact", "--text", text, "--context", "64")
    assert code == 0
    assert "perplexity" in stdout


def test_plan_and_schemes(finished: Finished, tmp_path: Path, capsys: Capture) -> None:
    command = ("plan", EXAMPLE, "--scheme", "w4g32", *(word for name in FORMATS for word in ("--to", name)))
    code, stdout = signround(capsys, *command, "-o", tmp_path / "out", "--json")
    assert code == 0
    planned = json.loads(stdout)
    assert len(planned["quantized"]) == 28
    for name, export in finished.report["exports"].items():
        assert planned["bytes"][name] == pytest.approx(export["bytes"], rel=0.25)
    assert signround(capsys, *command, "-o", tmp_path / "out")[0] == 0
    code, stdout = signround(capsys, "schemes", "--json")
    assert code == 0
    assert {"scheme", "bits_per_weight", "formats"} <= json.loads(stdout)[0].keys()
    assert "w4g32" in signround(capsys, "schemes")[1]


def test_the_second_run_says_that_it_is_done(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    again = run_job(EXAMPLE, finished.out)
    assert again.code == 0
    assert again.report == finished.report
    assert "this job is done already" in " ".join(again.stderr.split())
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_random_qwen3_runs_everywhere(tmp_path: Path) -> None:
    """Head size apart from the hidden size, q and k norms, 192 inputs. A random model's logits are flat, so its top-1
    gate may fail (exit code 1); its weights and its float32 runs may not."""
    model = write_small_model(tmp_path / "qwen3", "qwen3", hidden_size=192, intermediate_size=320)
    finished = run_job(model, tmp_path / "out")
    assert finished.code in (0, 1)
    assert "Traceback" not in finished.stderr
    exports = finished.report["exports"]
    assert exports.keys() == set(FORMATS)
    for name, export in exports.items():
        assert export["weights"]["exact"] == export["weights"]["tensors"], name
        assert not export["exact_logits"] or export["exact_logits"]["passed"], name
        assert export["logits"]["mean_kl"] < 2e-2
    assert finished.code == (0 if all(export["passed"] for export in exports.values()) else 1)
