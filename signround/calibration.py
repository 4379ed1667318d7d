"""Calibration tokens: windows of a text file, of a hub data set, or of text that the model writes itself.

All sources end as int64 windows [count, seqlen]. Documents are tokenised one after the other into one stream, so long
ones are cut and short ones packed, and none is dropped; the windows are drawn from the whole stream by the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround.architecture import EMBEDDING, Architecture, read_architecture
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, refuse
from signround.events import Listener, StageAdvanced
from signround.files import sha256_of, written_whole
from signround.loading import whole_model
from signround.plan import CalibrationSpec
from signround.recipes import TuningSettings, with_samples
from signround.safetensors_stream import save_tensors

EVALUATION_WINDOWS = 16  # windows that no tuning sees, for the perplexities of the report
PIECE_CHARACTERS = 1 << 20  # text is tokenised in pieces of about this size, cut at line ends


@dataclass(frozen=True)
class CalibrationTokens:
    """`tuning` [samples, seqlen], the held-out samples last; `evaluation` [n, seqlen], unseen unless `reused`."""

    tuning: Tensor
    evaluation: Tensor
    reused: bool

    @property
    def sha256(self) -> str:
        """Hash of the tokens that decide the integers."""
        return hashlib.sha256(self.tuning.to(torch.int64).numpy().tobytes()).hexdigest()


def write_tokens(path: Path, tokens: CalibrationTokens) -> None:
    """Keep the windows, so that a resumed run has them without reading or writing text again."""
    parts = {"tuning": tokens.tuning, "evaluation": tokens.evaluation}
    notes = {"sha256": _digest(tokens), "reused": str(tokens.reused)}
    with written_whole(path) as temporary:
        save_tensors(temporary, parts, notes)


def _digest(tokens: CalibrationTokens) -> str:
    return hashlib.sha256(tokens.tuning.numpy().tobytes() + tokens.evaluation.numpy().tobytes()).hexdigest()


def read_tokens(path: Path) -> CalibrationTokens | None:
    """Inverse of `write_tokens`; None when the file is missing or damaged: the same tokens can be made again."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            parts = {name: file.get_tensor(name).clone() for name in ("tuning", "evaluation")}
    except (OSError, SafetensorError):
        return None
    tokens = CalibrationTokens(**parts, reused=notes.get("reused") == "True")
    return tokens if _digest(tokens) == notes.get("sha256") else None


def kept_tokens(path: Path) -> CalibrationTokens:
    """`read_tokens` where the file must be there. Raises FailedError."""
    tokens = read_tokens(path)
    if tokens is None:
        raise FailedError(
            f"{path}: the calibration tokens are missing or damaged; "
            "run the `signround quantize` command that made the artifact again, it repairs them."
        )
    return tokens


def read_spec(text: str) -> CalibrationSpec:
    """The value of --calibration: `self`, `hub:NAME`, or the path of a text file. Refuses a file that is not there."""
    if text == "self" or text.startswith("hub:"):
        if text == "hub:":
            raise refuse("hub: needs the name of a data set", "write hub:NAME", "--calibration")
        return CalibrationSpec(text)
    path = Path(text)
    if not path.is_file():
        raise refuse(
            f"{text!r} is no file; allowed are a text file, self, or hub:NAME",
            "check the path, or leave --calibration out: the model then writes its own text",
            "--calibration",
        )
    return CalibrationSpec("file", sha256_of(path))


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer from local files only. Raises RefusedError when it cannot be loaded without remote code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise refuse(
            f"the tokenizer cannot be loaded ({str(error).splitlines()[0]})",
            "put tokenizer.json (or tokenizer.model) beside config.json",
            str(folder),
        ) from error


def text_tokens(tokenizer: Any, pieces: Iterator[str]) -> Tensor:
    """One stream of token ids [n] without special tokens, from pieces of text."""
    ids: list[int] = []
    for piece in pieces:
        ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def file_pieces(path: Path) -> Iterator[str]:
    """A UTF-8 text in pieces that end at line ends. Raises RefusedError for other encodings."""
    try:
        with open(path, encoding="utf-8") as stream:
            while lines := stream.readlines(PIECE_CHARACTERS):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise refuse(
            f"not UTF-8 text ({error.reason} at byte {error.start})", "convert it to UTF-8", str(path)
        ) from error


def hub_pieces(name: str, column: str = "text") -> Iterator[str]:
    """The documents of a data set of the Hugging Face hub, streamed. Raises RefusedError without the `hub` extra."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise refuse(
            "hub data sets need the package `datasets`, which is not installed",
            "run `pip install signround[hub]`, or give a text file",
            "--calibration",
        ) from error
    for row in load_dataset(name, split="train", streaming=True):
        if column not in row:
            raise refuse(
                f"data set {name} has no column {column!r} (columns: {', '.join(row)})",
                "choose a data set with plain text, or export it to a file",
                "--calibration",
            )
        yield row[column] + "\n\n"


def stream_tokens(spec: CalibrationSpec, source: str, tokenizer: Any, needed: int) -> Tensor:
    """Tokens of a file (all of them) or of a hub data set (about `needed`)."""
    if spec.source == "file":
        return text_tokens(tokenizer, file_pieces(Path(source)))
    parts: list[Tensor] = []
    for piece in hub_pieces(spec.source.removeprefix("hub:")):
        parts.append(text_tokens(tokenizer, iter([piece])))
        if sum(len(part) for part in parts) >= needed:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def fit_to_text(settings: TuningSettings, tokens: int, bos: int | None, least: int) -> TuningSettings:
    """As many samples as a text of so many `tokens` has, some windows left unseen. Never fewer than `least`, which the
    text may lack: `windows_of` then refuses it."""
    windows = tokens // _body(settings, bos)
    return with_samples(settings, min(settings.samples, max(windows - EVALUATION_WINDOWS, least)))


def _body(settings: TuningSettings, bos: int | None) -> int:
    """Tokens of the text in a window."""
    return settings.seqlen - (bos is not None)


def windows_of(tokens: Tensor, settings: TuningSettings, bos: int | None, source: str) -> CalibrationTokens:
    """Draw the windows by the seed. With `bos`, each window begins with it, as the model sees texts in use.

    Raises RefusedError when the stream is shorter than samples x seqlen tokens.
    """
    body = _body(settings, bos)
    available = len(tokens) // body
    if available < settings.samples:
        raise refuse(
            f"{source} has {len(tokens)} tokens, {settings.samples * body} are needed "
            f"({settings.samples} samples of {settings.seqlen})",
            f"give a longer text, or use --samples {available}" if available >= 2 else "give a longer text",
            "--calibration",
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed))
    cut = tokens[: available * body].view(available, body)
    if bos is not None:
        cut = torch.cat([torch.full((available, 1), bos, dtype=cut.dtype), cut], dim=1)
    spare = order[settings.samples : settings.samples + EVALUATION_WINDOWS]
    reused = len(spare) == 0
    if reused:
        spare = order[settings.samples - max(settings.held_out, 1) : settings.samples]
    return CalibrationTokens(cut[order[: settings.samples]].contiguous(), cut[spare].contiguous(), reused)


def leading_bos(tokenizer: Any) -> int | None:
    """The id that the tokenizer puts before a text, if it puts one."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    if len(with_special) > len(without) and with_special[0] == tokenizer.bos_token_id:
        return int(with_special[0])
    return None


def self_written(
    checkpoint: SourceCheckpoint,
    skipped: Collection[str],
    tokenizer: Any,
    settings: TuningSettings,
    on_event: Listener,
) -> CalibrationTokens:
    """Text sampled from the model's own distribution (temperature 1, no truncation), window by window.

    Each window begins with the token that begins a text (bos, else eos as document separator); an end of text inside
    a window simply starts the next document. Seeded; the whole model is in memory while it writes, in its own dtype.
    `skipped` names tensors of the checkpoint that are not part of the model.
    """
    count = settings.samples + EVALUATION_WINDOWS
    beginnings = (leading_bos(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in beginnings if token is not None), 0)
    names = [name for name in checkpoint.tensors if name not in skipped]
    dtype = checkpoint.tensors[EMBEDDING].dtype
    model = whole_model(checkpoint.folder, names, lambda name: checkpoint.read(name).to(dtype), dtype)
    model = model.to(settings.device)
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    windows = torch.full((count, settings.seqlen), first, dtype=torch.int64)
    batch = writing_batch(read_architecture(checkpoint.config), settings.seqlen)
    with _threads_for(checkpoint.config["hidden_size"]):
        for start in range(0, count, batch):
            part = windows[start : start + batch]
            steps = _write(model, part.to(settings.device), generator)
            for position, column in enumerate(steps, start=1):
                part[:, position] = column.cpu()
                if position % 16 == 0 or position == settings.seqlen - 1:
                    done = start * settings.seqlen + len(part) * (position + 1)
                    on_event(StageAdvanced("calibrate", done, count * settings.seqlen, "tokens written by the model"))
    return CalibrationTokens(windows[: settings.samples], windows[settings.samples :], reused=False)


@contextmanager
def _threads_for(hidden: int) -> Iterator[None]:
    """Writing one token a window makes small products. Up to this width a second thread gains a tenth on an idle
    machine and costs a factor of 3 to 8 on a busy one, where each product waits for the slower core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if hidden <= 1024 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(model: Any, windows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Sample one column after the other, [windows] each, with a KV cache."""
    cache = None
    column = windows[:, :1]
    with torch.no_grad():
        for _ in range(windows.shape[1] - 1):
            output = model(input_ids=column, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(-1)
            column = torch.multinomial(probabilities, 1, generator=generator)
            yield column[:, 0]


def cache_bytes(architecture: Architecture, seqlen: int) -> int:
    """Key-value cache of one window in 16 bits."""
    return 2 * architecture.layers * architecture.width("keys") * seqlen * 2


def writing_batch(architecture: Architecture, seqlen: int) -> int:
    """Windows written together: as many as a KV cache of 512 MiB (bf16) holds, at most 64."""
    return max(1, min(64, (512 << 20) // cache_bytes(architecture, seqlen)))
