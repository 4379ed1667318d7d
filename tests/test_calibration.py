"""Calibration windows: where the tokens come from, that none is lost, and that the seed decides."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from signround.calibration import (
    EVALUATION_WINDOWS,
    CalibrationTokens,
    file_pieces,
    fit_to_text,
    kept_tokens,
    leading_bos,
    load_tokenizer,
    read_spec,
    read_tokens,
    self_written,
    stream_tokens,
    text_tokens,
    windows_of,
    write_tokens,
)
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import silent
from signround.plan import CalibrationSpec
from signround.recipes import TuningSettings, settings_for
from tests.small_models import write_small_model


def settings(samples: int = 6, seqlen: int = 16, seed: int = 0) -> TuningSettings:
    return settings_for(context=512, samples=samples, seqlen=seqlen, seed=seed, iters=1)


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> Any:
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one word and of thousands, blank lines, tabs, a line without an end."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    long = " ".join(f"word{i}" for i in range(900))
    path.write_text("a\n\n\nSecond, short.\n\tTabbed text\n" + long + "\nThe quick brown fox\n" * 20 + "no end")
    return path


# ---- text files


def test_every_document_is_in_the_stream(tokenizer: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones are cut and short ones packed: decoded, the stream is the file again."""
    monkeypatch.setattr("signround.calibration.PIECE_CHARACTERS", 64)
    stream = stream_tokens(read_spec(str(text)), str(text), tokenizer, needed=1)
    assert tokenizer.decode(stream) == text.read_text()
    assert stream.dtype == torch.int64


def test_pieces_end_at_line_ends(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signround.calibration.PIECE_CHARACTERS", 64)
    pieces = list(file_pieces(text))
    assert "".join(pieces) == text.read_text()
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_windows_are_drawn_from_the_whole_stream(tokenizer: Any, text: Path) -> None:
    stream = text_tokens(tokenizer, file_pieces(text))
    count = len(stream) // 15
    everything = settings(samples=count)
    tokens = windows_of(stream, everything, bos=0, source="text")
    assert tokens.tuning.shape == (count, 16)
    assert bool((tokens.tuning[:, 0] == 0).all())  # each window begins as texts do
    cut = {tuple(window) for window in stream[: count * 15].view(count, 15).tolist()}
    assert {tuple(window[1:]) for window in tokens.tuning.tolist()} == cut
    assert tokens.reused  # no window is left that tuning does not see ...
    assert torch.equal(tokens.evaluation, tokens.tuning[-everything.held_out :])  # ... but none that is trained on


def test_evaluation_windows_are_unseen(tokenizer: Any, text: Path) -> None:
    stream = text_tokens(tokenizer, file_pieces(text))
    tokens = windows_of(stream, settings(), bos=None, source="text")
    assert tokens.tuning.shape == (6, 16)
    assert tokens.evaluation.shape == (EVALUATION_WINDOWS, 16)
    assert not tokens.reused
    cut = stream[: len(stream) // 16 * 16].view(-1, 16)
    for window in [*tokens.tuning, *tokens.evaluation]:
        assert bool((cut == window).all(1).any())  # no bos, no padding: the text as it is
    both = {tuple(window) for window in tokens.evaluation.tolist()} & {tuple(row) for row in tokens.tuning.tolist()}
    repeated = len(cut) - len({tuple(window) for window in cut.tolist()})
    assert len(both) <= repeated


def test_the_seed_draws_the_windows(tokenizer: Any, text: Path) -> None:
    stream = text_tokens(tokenizer, file_pieces(text))
    first, again, other = (windows_of(stream, settings(seed=seed), 0, "text") for seed in (0, 0, 1))
    assert torch.equal(first.tuning, again.tuning)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.tuning, other.tuning)
    assert first.sha256 != other.sha256


def test_too_short_a_text_is_refused_with_numbers() -> None:
    stream = torch.arange(100)
    with pytest.raises(RefusedError, match=r"t.txt has 100 tokens, 120 are needed \(8 samples of 16\).*--samples 6"):
        windows_of(stream, settings(samples=8), bos=0, source="t.txt")
    windows_of(stream, settings(samples=6), bos=0, source="t.txt")  # and that advice works
    with pytest.raises(RefusedError, match=r"has 20 tokens, .*; give a longer text\.$"):
        windows_of(torch.arange(20), settings(samples=8), bos=None, source="t.txt")


@pytest.mark.parametrize("bos", [None, 0])
def test_a_recipe_takes_what_the_text_has(bos: int | None) -> None:
    """Some windows stay unseen, but not at the cost of the least that will do; a shorter text is refused."""
    asked = settings(samples=100)
    body = 16 - (bos is not None)

    def found(windows: int) -> int:
        return fit_to_text(asked, windows * body + 3, bos, least=25).samples

    assert [found(windows) for windows in (500, 116, 115, 60, 41, 40, 25, 24)] == [100, 100, 99, 44, 25, 25, 25, 25]
    fewer = fit_to_text(asked, 60 * body, bos, least=25)
    tokens = windows_of(torch.arange(60 * body), fewer, bos, "t.txt")
    assert (len(tokens.tuning), len(tokens.evaluation), tokens.reused) == (44, EVALUATION_WINDOWS, False)
    with pytest.raises(RefusedError, match=r"are needed \(25 samples of 16\).*--samples 24"):
        windows_of(torch.arange(24 * body), fit_to_text(asked, 24 * body, bos, least=25), bos, "t.txt")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(RefusedError, match=r"latin.txt: not UTF-8 text .*byte 2.*convert it"):
        list(file_pieces(path))


def test_specifications(text: Path, tmp_path: Path) -> None:
    assert read_spec("self") == CalibrationSpec("self")
    assert read_spec("hub:someone/texts") == CalibrationSpec("hub:someone/texts")
    copied = tmp_path / "moved.txt"
    copied.write_text(text.read_text())
    assert read_spec(str(copied)) == read_spec(str(text))  # the bytes count, not the place
    copied.write_text(text.read_text() + "!")
    assert read_spec(str(copied)) != read_spec(str(text))
    for missing in (str(tmp_path / "none.txt"), str(tmp_path), "hub:"):
        with pytest.raises(RefusedError):
            read_spec(missing)


# ---- the hub


def test_without_the_package_the_hub_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_datasets(name: str, *rest: Any, **named: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(RefusedError, match=r"datasets.*not installed.*pip install signround\[hub\]"):
        stream_tokens(CalibrationSpec("hub:a/b"), "hub:a/b", tokenizer, needed=10)


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: Iterator[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    asked: list[tuple[str, dict[str, Any]]] = []
    module = ModuleType("datasets")

    def load_dataset(name: str, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((name, options))
        return rows

    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_data_set_is_streamed_until_there_is_enough(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(1_000_000):
            taken.append(index)
            yield {"text": f"document number {index}", "url": "x"}

    asked = fake_hub(monkeypatch, rows())
    stream = stream_tokens(CalibrationSpec("hub:someone/texts"), "hub:someone/texts", tokenizer, needed=100)
    assert asked == [("someone/texts", {"split": "train", "streaming": True})]
    assert 100 <= len(stream) < 200
    assert len(taken) < 100
    expected = "".join(f"document number {index}\n\n" for index in taken)
    assert tokenizer.decode(stream) == expected


def test_a_data_set_without_text_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, iter([{"image": 1, "label": 2}]))
    with pytest.raises(RefusedError, match=r"no column 'text' \(columns: image, label\)"):
        stream_tokens(CalibrationSpec("hub:a/b"), "hub:a/b", tokenizer, needed=10)


def test_an_empty_data_set_is_too_short(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, iter([]))
    stream = stream_tokens(CalibrationSpec("hub:a/b"), "hub:a/b", tokenizer, needed=10)
    with pytest.raises(RefusedError, match="has 0 tokens"):
        windows_of(stream, settings(), 0, "hub:a/b")


# ---- text that the model writes itself


def written(folder: Path, seed: int = 0) -> CalibrationTokens:
    chosen = replace(settings(seqlen=12), seed=seed)
    return self_written(SourceCheckpoint(folder), (), load_tokenizer(folder), chosen, silent)


def test_self_written_text_is_decided_by_the_seed(llama_folder: Path) -> None:
    first = written(llama_folder)
    torch.manual_seed(5)
    torch.rand(3)
    again, other = written(llama_folder), written(llama_folder, seed=1)
    assert torch.equal(first.tuning, again.tuning)
    assert torch.equal(first.evaluation, again.evaluation)
    assert not torch.equal(first.tuning, other.tuning)
    assert first.tuning.shape == (6, 12)
    assert first.evaluation.shape == (EVALUATION_WINDOWS, 12)
    assert not first.reused
    everything = torch.cat([first.tuning, first.evaluation])
    assert bool((everything[:, 0] == 0).all())  # bos
    assert len({tuple(window) for window in everything.tolist()}) == len(everything)  # windows differ
    assert int(everything.max()) < 512


def test_self_written_text_follows_the_model(tmp_path: Path) -> None:
    """A model whose head only knows token 7 writes nothing else."""
    folder = write_small_model(tmp_path / "model", "llama-untied", dtype=torch.float32)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(1.0)
    weights["lm_head.weight"].zero_()
    down = "model.layers.1.mlp.down_proj.weight"
    weights[down].zero_()
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    # The residual stream is made constant: one direction, which the head maps to token 7.
    weights["model.embed_tokens.weight"].fill_(1.0)
    for name in (down, "model.layers.1.self_attn.o_proj.weight"):
        weights[name.replace("layers.1", "layers.0")].zero_()
    weights["lm_head.weight"][7] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = written(folder)
    assert set(tokens.tuning[:, 1:].flatten().tolist()) == {7}


def test_a_model_without_bos_begins_with_its_end_of_text(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path / "model", "qwen2", tokenizer="qwen2")
    tokenizer = load_tokenizer(folder)
    assert leading_bos(tokenizer) is None  # nothing is put before texts
    first = int(written(folder).tuning[0, 0])
    assert first in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_leading_bos(tokenizer: Any) -> None:
    assert leading_bos(tokenizer) == tokenizer.bos_token_id == 0


# ---- kept in the artifact


def test_tokens_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    for reused in (True, False):
        tokens = CalibrationTokens(torch.arange(12).view(3, 4), torch.arange(8).view(2, 4), reused)
        write_tokens(path, tokens)
        found = kept_tokens(path)
        assert torch.equal(found.tuning, tokens.tuning)
        assert torch.equal(found.evaluation, tokens.evaluation)
        assert (found.reused, found.sha256) == (reused, tokens.sha256)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty", "foreign"])
def test_damaged_tokens_are_made_again_or_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "calibration.safetensors"
    write_tokens(path, CalibrationTokens(torch.arange(12).view(3, 4), torch.arange(8).view(2, 4), False))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"tuning": torch.arange(4).view(1, 4), "evaluation": torch.arange(4).view(1, 4)}, path)
    else:
        path.write_bytes({"cut": content[:-8], "flipped": content[:-2] + b"\1" + content[-1:], "empty": b""}[damage])
    assert read_tokens(path) is None
    with pytest.raises(FailedError, match="missing or damaged; run the `signround quantize` command"):
        kept_tokens(path)


# ---- tokenizers


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    with pytest.raises(RefusedError, match=r"tokenizer cannot be loaded.*put tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RefusedError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
