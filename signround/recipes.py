"""How hard to tune: the named recipes and the settings of one run. Values with their sources; chosen by measurement.

The paper's defaults (arXiv 2309.05516 v5; AutoRound 0.16): 200 steps, batch 8, 128 samples of 2048 tokens, lr 1/steps
falling linearly to 0. The draft (v1): 400 steps, lr 2.5e-3, no range tuning, float inputs, 512 samples of 512 tokens.
Ours take more and shorter samples than the paper. docs/decisions.md holds the measurements behind the recipes of each
device.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from signround.errors import refuse

Method = Literal["signround", "signround-400", "rtn"]
Device = Literal["cpu", "cuda"]
METHODS: tuple[Method, ...] = ("signround", "signround-400", "rtn")
RECIPES = ("fast", "default", "best")


@dataclass(frozen=True)
class TuningSettings:
    """Everything that decides the integers, besides the model, the scheme and the tokens.

    `samples` sequences of `seqlen` tokens, `held_out` of them kept back to choose the best step; `learning_rate` in
    units of a quantisation step; `compute` is the dtype of the matrix products; `start` is where tuning begins:
    "range" (min/max, as the paper) or "search" (activation-weighted search of each group's scale first);
    `scale_iters` steps follow the `iters` on the rounding, at first of `scale_rate` of a scale (tuning/scales.py);
    `hidden_states` is the dtype in which the two chains wait in memory between blocks; with `lookahead` 1 the error
    behind the following block counts as well (tuning/ahead.py).
    """

    method: Method
    recipe: str
    iters: int
    learning_rate: float
    batch_size: int
    samples: int
    held_out: int
    seqlen: int
    seed: int
    device: Device
    compute: Literal["bf16", "fp32"]
    hidden_states: Literal["fp32", "bf16"]
    start: Literal["range", "search"]
    lookahead: Literal[0, 1] = 0
    scale_iters: int = 0
    scale_rate: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


BATCH_SIZE = 8  # as in the paper
SCALE_SHARE, SCALE_RATE = 0.5, 2e-3  # steps on the scales a step on the rounding, and their first size
# (iters, samples, held_out, seqlen) a recipe and device
_EFFORT: dict[tuple[str, Device], tuple[int, int, int, int]] = {
    ("fast", "cpu"): (100, 256, 8, 256),
    ("default", "cpu"): (200, 512, 8, 512),
    ("best", "cpu"): (500, 1024, 16, 512),
    ("fast", "cuda"): (100, 512, 8, 512),
    ("default", "cuda"): (200, 512, 8, 1024),
    ("best", "cuda"): (500, 1024, 16, 1024),
}
LEAST_SHARE = 4  # a recipe makes do with a quarter of its samples where text or memory has no room for more


def settings_for(
    method: str = "signround",
    recipe: str = "default",
    device: str = "cpu",
    *,
    context: int,
    samples: int | None = None,
    seqlen: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    experts: bool = False,
) -> TuningSettings:
    """Settings of a recipe, with the user's own numbers on top. `context` bounds the sequence length; a model with
    `experts` does not look ahead, since a second block of experts may not fit into memory.

    Raises RefusedError for unknown names, numbers out of range, an absent device, and flags that do not apply.
    """
    if method not in METHODS:
        raise refuse(f"method {method!r} is not known; allowed are {', '.join(METHODS)}", "choose one", "--method")
    if recipe not in RECIPES:
        raise refuse(f"recipe {recipe!r} is not known; allowed are {', '.join(RECIPES)}", "choose one", "--recipe")
    if method == "rtn" and (iters is not None or batch_size is not None):
        raise refuse("--iters and --batch-size do not apply to --method rtn", "leave them out", "--method")
    device_name, compute = checked_device(device)
    effort_iters, effort_samples, held_out, effort_seqlen = _EFFORT[recipe, device_name]
    if method == "signround-400":
        effort_iters = 400
    elif method == "rtn":
        effort_iters, held_out, effort_samples = 0, 0, effort_samples // LEAST_SHARE  # they tell perplexities, no more
    settings = TuningSettings(
        method=method,
        recipe=recipe,
        iters=effort_iters if iters is None else iters,
        learning_rate=0.0,
        batch_size=0 if batch_size is None else batch_size,  # 0: the default, settled in _checked
        samples=effort_samples if samples is None else samples,
        held_out=held_out,
        seqlen=min(effort_seqlen if seqlen is None else seqlen, context),
        seed=seed,
        device=device_name,
        compute=compute,
        hidden_states="fp32",
        start="search" if method == "signround" else "range",
        lookahead=1 if method == "signround" and recipe != "fast" and not experts else 0,
    )
    return _checked(settings, seqlen, batch_size, context)


def hidden_copies(settings: TuningSettings) -> int:
    """How many times the hidden states of all samples are in memory."""
    return {"rtn": 0, "signround": 2 + settings.lookahead, "signround-400": 3}[settings.method]


def least_samples(settings: TuningSettings, given: int | None) -> int:
    """How few samples will do: as many as the user asked for, else a share of the recipe's."""
    return settings.samples if given is not None else max(2, settings.samples // LEAST_SHARE)


def fit_to_memory(settings: TuningSettings, hidden: int, memory: int, least: int) -> TuningSettings:
    """Let the two chains of hidden states (and one copy for the draft's float inputs, or for the targets of the block
    that follows) take at most half of `memory` bytes: in float32 if they fit, else in bfloat16, else of fewer samples,
    `least` or more, else refused."""
    elements = hidden_copies(settings) * settings.seqlen * hidden  # of one sample
    if elements * settings.samples * 4 <= memory // 2:
        return settings
    samples = settings.samples
    while samples > least and elements * samples * 2 > memory // 2:
        samples = max(samples // 2, least)
    if elements * samples * 2 <= memory // 2:
        return replace(with_samples(settings, samples), hidden_states="bf16")
    raise refuse(
        f"hidden states of {samples} samples x {settings.seqlen} tokens need {elements * samples * 2 / 1e9:.1f} GB, "
        f"half of this machine's memory is {memory / 2e9:.1f} GB",
        "use fewer --samples or a shorter --seqlen",
        "--samples",
    )


def with_samples(settings: TuningSettings, samples: int) -> TuningSettings:
    """So many samples, at most a quarter of them held out. Raises RefusedError where a step takes more of them than are
    left to train on."""
    held_out = min(settings.held_out, samples // 4 or 1)
    training = samples - held_out
    if settings.batch_size > training:
        raise refuse(
            f"{settings.batch_size} windows a step exceed the {training} windows to train on "
            f"({samples} samples, {held_out} of them held out)",
            "use more --samples or a smaller --batch-size",
            "--batch-size",
        )
    return replace(settings, samples=samples, held_out=held_out)


def _checked(settings: TuningSettings, seqlen: int | None, batch_size: int | None, context: int) -> TuningSettings:
    least = {"--samples": (settings.samples, 2), "--seqlen": (settings.seqlen, 8)}
    if settings.method != "rtn":
        least["--iters"] = (settings.iters, 1)
    if batch_size is not None:
        least["--batch-size"] = (batch_size, 1)
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise refuse(f"{value} is too small; allowed is {minimum} or more", "choose a larger number", flag)
    if seqlen is not None and seqlen > context:
        raise refuse(f"{seqlen} tokens exceed the model's context of {context}", f"use at most {context}", "--seqlen")
    settings = with_samples(settings, settings.samples)
    rate = 2.5e-3 if settings.method == "signround-400" else 1.0 / max(settings.iters, 1)
    chosen = settings.batch_size or min(BATCH_SIZE, settings.samples - settings.held_out)
    settings = replace(settings, learning_rate=rate, batch_size=chosen)
    if settings.method != "signround":
        return settings
    return replace(settings, scale_iters=math.ceil(settings.iters * SCALE_SHARE), scale_rate=SCALE_RATE)


def checked_device(device: str) -> tuple[Device, Literal["bf16", "fp32"]]:
    """The device and the dtype of its fast matrix products. Raises RefusedError for an unknown or absent device."""
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise refuse(
                "cuda was asked for, but torch finds no CUDA device",
                "use --device cpu, or install a CUDA build of torch",
                "--device",
            )
        return "cuda", "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device != "cpu":
        raise refuse(f"device {device!r} is not known; allowed are cpu, cuda", "choose one", "--device")
    return "cpu", "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
