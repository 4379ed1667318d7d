"""What lies outside the blocks: searched embeddings, heads tuned in slices, and the chain that runs between them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import signround
from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.cli.main import main
from signround.formats import grid_for
from signround.inspection import inspect_target, inspection_lines
from signround.pipeline import export, kept_tokens
from signround.plan import LayerPlan
from signround.qtensor import QuantizedTensor
from signround.runtimes.torch_blocks import float_model, rounded_model, tuned_model
from signround.tuning import loop, outer
from signround.tuning.chain import HEAD_SAMPLES, TuningChain
from signround.tuning.outer import HeadProblem, joined, quantized_in_slices, tuned_head
from signround.tuning.rtn import rounded
from signround.tuning.signround import descent_for
from signround.tuning.start import searched_start
from tests.small_models import write_small_model
from tests.tuning.problems import settings

WHOLE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 384,
}  # fmt: skip
FAST: dict[str, Any] = {"samples": 12, "seqlen": 16, "iters": 4, "batch_size": 4}
RTN: dict[str, Any] = {"method": "rtn", "samples": 2, "seqlen": 16}
SCHEMES = ["q4_k", "q6_k", "iq4_xs", "q8_0", "mxfp4", "q5_0", "q4_1"]
CPU = torch.device("cpu")


def head(rows: int = 48, columns: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [rows, columns], normed float hidden states whose columns go together as in real models (there is nothing
    to tune otherwise), and the same with the noise of quantised blocks."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.randn(24, columns, generator=generator)
    references = torch.randn(16, 24, 24, generator=generator) @ mixing
    references += 0.3 * torch.randn(16, 24, columns, generator=generator)
    noise = torch.randn(16, 24, columns, generator=generator) * 0.02
    return weight, references, references + noise


def tune(scheme: str, slice_rows: int, iters: int = 20, rows: int = 48) -> QuantizedTensor:
    weight, references, inputs = head(rows)
    layer = LayerPlan(HEAD, *weight.shape, grid_for(scheme), "")
    chosen = dataclasses.replace(settings(), iters=iters, learning_rate=1 / iters)

    def problem_of(part: Tensor) -> HeadProblem:
        return HeadProblem(inputs, references, part, chosen.held_out)

    importance = references.square().mean((0, 1))
    descent = descent_for("signround", "search")
    return tuned_head(
        layer, weight, problem_of, importance, chosen, descent, slice_rows * weight.shape[1], lambda *_: None
    )


def held_out(tensor: QuantizedTensor, rows: int = 48) -> float:
    weight, references, inputs = head(rows)
    problem = HeadProblem(inputs, references, weight, 4)
    return problem.held_out_loss({"weight": tensor.decode()}, 4).item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tuned_head_is_never_worse_and_gains_over_its_start(scheme: str) -> None:
    weight, references, _ = head()
    grid = grid_for(scheme)
    start = searched_start(grid, weight, references.square().mean((0, 1)))
    searched = held_out(QuantizedTensor.from_grid(grid, weight, start.fields(grid)))
    plain = held_out(rounded(grid, weight))
    tuned = held_out(tune(scheme, slice_rows=48))
    assert tuned <= min(plain, searched)
    if grid.bits <= 4:
        assert tuned < 0.97 * searched
        assert searched < plain


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "q4_1", "q4_0"])
def test_rows_of_a_head_do_not_know_of_each_other(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of samples is that of the seed, not of the slice: with the last step kept, all slices give the codes of
    the whole. Each slice keeps the step that is best for it: that is better than one step for all, but for what the
    scales make of other codes."""
    whole = tune(scheme, slice_rows=48)
    assert torch.equal(tune(scheme, slice_rows=1000).codes, whole.codes)
    for rows in (7, 16):
        assert held_out(tune(scheme, slice_rows=rows)) <= held_out(whole) * 1.01
    checks = iter(range(1 << 20))
    monkeypatch.setattr(loop, "_held_out", lambda *_: torch.tensor(-float(next(checks))))
    whole = tune(scheme, slice_rows=48)
    for rows in (7, 16):
        parts = tune(scheme, slice_rows=rows)
        differing = (parts.codes != whole.codes).float().mean()
        assert differing < 0.02, rows  # sums of another shape round otherwise, and the sign of a gradient of 0 is luck


@pytest.mark.parametrize("scheme", [*SCHEMES, "q2_k", "q3_k"])
@pytest.mark.parametrize("importance", [None, "ones", "spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_an_embedding_give_the_bytes_of_the_whole(
    scheme: str, importance: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = head(20)[0].to(dtype)
    columns = {None: None, "ones": torch.ones(256), "spread": head()[1].square().mean((0, 1))}[importance]
    whole = quantized_in_slices(grid_for(scheme), weight, columns, CPU)
    monkeypatch.setattr(outer, "SLICE_WEIGHTS", 3 * 256)
    parts = quantized_in_slices(grid_for(scheme), weight, columns, CPU)
    assert torch.equal(parts.codes, whole.codes)
    assert parts.fields.keys() == whole.fields.keys()
    assert all(torch.equal(field, whole.fields[name]) for name, field in parts.fields.items())
    if importance is None:
        assert torch.equal(whole.codes, rounded(grid_for(scheme), weight.float()).codes)
    error = (whole.decode() - weight.float()).square() * (1.0 if columns is None else columns)
    plain = (rounded(grid_for(scheme), weight.float()).decode() - weight.float()).square()
    assert error.sum() <= (plain * (1.0 if columns is None else columns)).sum() * (1 + 1e-5)


def test_one_slice_is_itself() -> None:
    tensor = rounded(grid_for("q4_k"), head()[0])
    again = joined(tensor.grid, [tensor])
    assert torch.equal(again.codes, tensor.codes)


# ---- in the chain


def model_of(folder: Path, family: str = "llama", **changes: Any) -> Path:
    return write_small_model(folder, family, **(WHOLE | changes))


@pytest.fixture(scope="module", params=["llama", "llama-untied"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Model, output folder and report of a q4_k_m job."""
    folder = tmp_path_factory.mktemp(request.param)
    model = model_of(folder / "model", request.param)
    return model, folder / "out", signround.quantize(model, "q4_k_m", folder / "out", **FAST)


def float_head_inputs(model: Path, tokens: Tensor) -> Tensor:
    """What transformers multiplies with the head: the output of the final norm, [windows, tokens, hidden]."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden: Tensor = network.model(tokens).last_hidden_state
    return hidden


def calibration(out: Path) -> Tensor:
    return kept_tokens(out / "artifact" / "calibration.safetensors").tuning


def test_importances_are_those_of_the_float_head(job: tuple[Path, Path, dict[str, Any]]) -> None:
    model, out, _ = job
    artifact = QuantizedCheckpoint(out / "artifact")
    importance = artifact.importance()
    assert importance is not None
    tied = artifact.plan.architecture.tied
    tokens = calibration(out)
    name, tokens = (EMBEDDING, tokens[:HEAD_SAMPLES]) if tied else (HEAD, tokens)
    expected = float_head_inputs(model, tokens).square().sum((0, 1))
    assert torch.allclose(importance.squares[name].sums[0], expected, rtol=1e-4)
    assert importance.squares[name].counts.tolist() == [tokens.numel()]
    assert (EMBEDDING in importance.squares) == tied  # rows that are only looked up have none


def test_an_embedding_is_searched_row_by_row(job: tuple[Path, Path, dict[str, Any]]) -> None:
    model, out, _ = job
    artifact = QuantizedCheckpoint(out / "artifact")
    importance, weight = artifact.importance(), SourceCheckpoint(model).read(EMBEDDING).float()
    assert importance is not None
    means = importance.means(EMBEDDING)
    grid = artifact.layers[EMBEDDING].grid
    assert grid == grid_for("q6_k" if artifact.plan.architecture.tied else "q4_k")
    start = searched_start(grid, weight, torch.ones(256) if means is None else means[0])
    assert torch.equal(
        artifact.quantized(EMBEDDING).codes, QuantizedTensor.from_grid(grid, weight, start.fields(grid)).codes
    )


def test_the_quantised_chain_starts_from_the_quantised_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path / "model", layers=1)
    chains = []
    real = TuningChain._block

    def block(self: TuningChain, plan: Any, float_chain: Tensor, quantized_chain: Tensor) -> tuple[Tensor, Tensor]:
        chains.append((float_chain.clone(), quantized_chain.clone()))
        return real(self, plan, float_chain, quantized_chain)

    monkeypatch.setattr(TuningChain, "_block", block)
    signround.quantize(model, "q4_k_m", tmp_path / "out", **FAST)
    artifact, tokens = QuantizedCheckpoint(tmp_path / "out" / "artifact"), calibration(tmp_path / "out")
    float_chain, quantized_chain = chains[0]
    assert torch.equal(float_chain, SourceCheckpoint(model).read(EMBEDDING).float()[tokens])
    assert torch.equal(quantized_chain, artifact.weight(EMBEDDING)[tokens])
    assert not torch.equal(float_chain, quantized_chain)


def logit_error(model: Path, out: Path, weight: Tensor) -> float:
    """Squared error of the logits on the held-out windows, with `weight` as the head over the tuned blocks."""
    artifact = QuantizedCheckpoint(out / "artifact")
    tokens = calibration(out)[-artifact.plan.tuning.held_out :]
    with torch.no_grad():
        tuned = signround.load(out / "artifact").model(tokens).last_hidden_state
    wanted = float_head_inputs(model, tokens) @ SourceCheckpoint(model).read(HEAD).float().T
    return float((tuned @ weight.T - wanted).square().mean())


def test_a_head_of_its_own_is_tuned_against_the_float_logits(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "llama-untied", layers=1)
    out = tmp_path / "out"
    signround.quantize(model, "q4_k_m", out, tensor_types=["^output=q2_k"], **(FAST | {"iters": 30}))
    artifact, weight = QuantizedCheckpoint(out / "artifact"), SourceCheckpoint(model).read(HEAD).float()
    importance = artifact.importance()
    assert importance is not None
    means = importance.means(HEAD)
    assert means is not None
    grid = artifact.layers[HEAD].grid
    start = QuantizedTensor.from_grid(grid, weight, searched_start(grid, weight, means[0]).fields(grid))
    tuned = logit_error(model, out, artifact.weight(HEAD))
    assert tuned < 0.99 * logit_error(model, out, start.decode())
    assert tuned < 0.99 * logit_error(model, out, rounded(grid, weight).decode())


@pytest.mark.parametrize("kind", ["w3g32", "w4g64-asym"])
def test_a_head_named_by_an_override_is_tuned_too(tmp_path: Path, kind: str) -> None:
    """Under a scheme that is one grid, as under a file type."""
    model = model_of(tmp_path / "model", "llama-untied", layers=1)
    out = tmp_path / "out"
    signround.quantize(model, "w8g32", out, tensor_types=[f"lm_head={kind}"], **(FAST | {"iters": 30}))
    artifact, weight = QuantizedCheckpoint(out / "artifact"), SourceCheckpoint(model).read(HEAD).float()
    assert [layer.name for layer in artifact.plan.outer_layers] == [HEAD]
    assert artifact.layers[HEAD].grid == grid_for(kind)
    plain = logit_error(model, out, rounded(grid_for(kind), weight).decode())
    assert logit_error(model, out, artifact.weight(HEAD)) < 0.98 * plain


def test_an_untied_embedding_named_alone(tmp_path: Path) -> None:
    """It is searched row by row; the quantised chain starts from it, the head stays."""
    model = model_of(tmp_path / "model", "llama-untied", layers=1)
    signround.quantize(model, "w4g32", tmp_path / "out", tensor_types=["embed_tokens=w2g32"], **FAST)
    artifact, weight = (
        QuantizedCheckpoint(tmp_path / "out" / "artifact"),
        SourceCheckpoint(model).read(EMBEDDING).float(),
    )
    grid = grid_for("w2g32")
    start = searched_start(grid, weight, torch.ones(256))
    assert torch.equal(
        artifact.quantized(EMBEDDING).codes, QuantizedTensor.from_grid(grid, weight, start.fields(grid)).codes
    )
    assert HEAD in artifact.kept


@pytest.mark.parametrize("method", ["signround", "signround-400", "rtn"])
def test_a_block_that_is_kept_whole(tmp_path: Path, method: str) -> None:
    model = model_of(tmp_path / "model", "llama-untied", layers=3)
    effort = RTN if method == "rtn" else FAST | {"method": method}
    types = [r"layers\.1\.=float", "lm_head=w8g32"]
    report = signround.quantize(model, "w4g32", tmp_path / "out", tensor_types=types, **effort)
    artifact = QuantizedCheckpoint(tmp_path / "out" / "artifact")
    assert not artifact.plan.blocks[1].layers
    source = SourceCheckpoint(model)
    for name in artifact.kept:
        assert torch.equal(artifact.tensor(name), source.read(name)), name
    losses = report["tuning"]["blocks"][1]
    assert losses["loss_rounded"] == losses["loss_tuned"]


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "granite"])
@pytest.mark.parametrize("method", ["rtn", "signround-400"])
def test_methods_without_a_search_round_both(family: str, method: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", family, layers=1)
    effort = RTN if method == "rtn" else FAST | {"method": method}
    report = signround.quantize(model, "q4_k_m", tmp_path / "out", **effort)
    artifact = QuantizedCheckpoint(tmp_path / "out" / "artifact")
    assert artifact.importance() is None
    for layer in artifact.plan.outer_layers:
        plain = rounded(layer.grid, SourceCheckpoint(model).read(layer.name).float())
        assert torch.equal(artifact.quantized(layer.name).codes, plain.codes)
    if method == "rtn":
        assert report["perplexity"]["tuned"] == pytest.approx(report["perplexity"]["rounded"], rel=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "qwen2-moe"])
def test_families_with_scales_and_experts(family: str, tmp_path: Path) -> None:
    """Norms + 1, multiplied embeddings, capped logits; importances are still those of transformers."""
    changes = {"layer_types": ["full_attention"]} if family == "gemma3" else {}
    model = model_of(tmp_path / "model", family, layers=1, **changes)
    signround.quantize(model, "q5_k_m", tmp_path / "out", **FAST)
    artifact, tokens = QuantizedCheckpoint(tmp_path / "out" / "artifact"), calibration(tmp_path / "out")
    importance = artifact.importance()
    assert importance is not None
    name, seen = (EMBEDDING, tokens[:HEAD_SAMPLES]) if artifact.plan.architecture.tied else (HEAD, tokens)
    expected = float_head_inputs(model, seen).square().sum((0, 1))
    assert torch.allclose(importance.squares[name].sums[0], expected, rtol=1e-3)


# ---- what the rest of the library makes of it


def test_the_loaded_model_is_the_tuned_one(job: tuple[Path, Path, dict[str, Any]]) -> None:
    model, out, _ = job
    artifact = QuantizedCheckpoint(out / "artifact")
    loaded = signround.load(out / "artifact")
    parameters = dict(loaded.named_parameters())
    for name in artifact.layers:
        assert torch.equal(parameters[name], artifact.quantized(name).decode()), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == artifact.plan.architecture.tied
    windows = calibration(out)[:2]
    with torch.no_grad():
        logits = loaded(windows).logits
    expected = torch.cat(list(tuned_model(artifact).logits(windows)))
    assert (logits - expected).norm() / expected.norm() <= 1e-5
    float_logits = torch.cat(list(float_model(SourceCheckpoint(model)).logits(windows)))
    plain = torch.cat(list(rounded_model(SourceCheckpoint(model), artifact.plan).logits(windows)))
    tuned_error, rounded_error = ((found - float_logits).norm() / float_logits.norm() for found in (expected, plain))
    assert 0 < tuned_error < rounded_error


def test_bits_and_report_and_inspection_count_them(job: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, out, report = job
    artifact = QuantizedCheckpoint(out / "artifact")
    layers = list(artifact.layers.values())
    names = {EMBEDDING} if artifact.plan.architecture.tied else {EMBEDDING, HEAD}
    assert {layer.name for layer in artifact.plan.outer_layers} == names
    assert len(layers) == 14 + len(names)
    stored = {"q4_k": 4.5, "q6_k": 6.5625}
    known = {grid_for(name): bits for name, bits in stored.items()}
    weights = sum(layer.rows * layer.columns for layer in layers)
    bits = sum(layer.rows * layer.columns * known[layer.grid] for layer in layers)
    assert report["artifact"]["bits_per_weight"] == pytest.approx(bits / weights)
    found = inspect_target(out / "artifact")
    assert sum(grid["linears"] for grid in found["grids"]) == len(layers)
    assert sum(grid["weights"] for grid in found["grids"]) == weights
    assert {grid_for(name).to_json()["bits"] for name in stored} == {grid["grid"]["bits"] for grid in found["grids"]}
    assert inspection_lines(found)
    target = export(artifact, "gguf", tmp_path / "gguf").target
    theirs, ours = (sorted(map(str, each["grids"])) for each in (inspect_target(target), found))
    assert theirs == ours
    assert "q4_k_m" in (out / "report.md").read_text()


def test_evaluate(job: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, _ = job
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(out / "artifact"), "--text", str(text), "--reference", str(model), "--context", "32",
              "--json"])  # fmt: skip
    assert ended.value.code == 0
    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["mean_kl"] < 0.5


def test_the_plan_names_them(
    job: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, report = job
    command = ["plan", str(model), "--scheme", "q4_k_m", "--to", "gguf", "--samples", "12", "--seqlen", "16"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--iters", "4", "--batch-size", "4", "--json"])
    assert ended.value.code == 0
    planned = json.loads(capsys.readouterr().out)
    reasons = {entry["name"]: entry["reason"] for entry in planned["quantized"]}
    artifact = QuantizedCheckpoint(out / "artifact")
    assert list(reasons) == list(artifact.layers)
    tied = artifact.plan.architecture.tied
    assert reasons[EMBEDDING] == (
        "q6_k (q4_k_m: more bits on the embedding, it is the head too)" if tied else "q4_k (file type q4_k_m)"
    )
    if not tied:
        assert reasons[HEAD] == "q6_k (q4_k_m: more bits on the head)"
    assert planned["fingerprint"] == artifact.plan.fingerprint
    assert planned["bits_per_weight"] == pytest.approx(report["artifact"]["bits_per_weight"])
    written = export(artifact, "gguf", tmp_path / "gguf")
    assert planned["bytes"]["gguf"] == sum(path.stat().st_size for path in written.files)
    on_disk = sum(path.stat().st_size for path in (out / "artifact").rglob("*.safetensors"))
    assert planned["bytes"]["artifact"] == pytest.approx(on_disk, rel=0.05)
    with pytest.raises(SystemExit):
        main(command)
    assert "bits a weight" in capsys.readouterr().out
