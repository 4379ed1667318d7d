"""Logits from onnxruntime: an exported folder, whose graph takes input_ids, attention_mask and past keys and values.

The accuracy_level of the file can be overridden for one session: at 0 the matrix products run in float32, which is the
oracle for what int8 activations (level 4) cost. Weights in DequantizeLinear have no level in the file: onnxruntime
takes it from the session, which is asked here for the level that the file was written for. Either flavour runs, with
float32 or fp16 activations; `position_ids` are fed where a graph wants them. On the CPU; refuses graphs that are not
such decoders.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from signround.errors import FailedError, refuse, unavailable
from signround.runtimes.onnx_files import data_problem, find_graph
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime
    from numpy.typing import NDArray

LOGIT_BYTES = 128 * 2**20  # of one batch: windows are batched up to this
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}  # of a cache: onnxruntime's name -> numpy's
LEVELLED = ("MatMulNBits", "QMoE")
NO_PREPACKING = "session.disable_prepacking"
QUIET = 4  # log severity: none but fatal ones; errors reach the caller as exceptions
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"  # of DequantizeLinear, which has none of its own
LEVEL_KEY = "signround.accuracy_level"  # model metadata of our files: the level that was asked for
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_onnxruntime(folder: Path, accuracy_level: int | None = None, threads: int = 0) -> OnnxRuntime:
    """Load `folder`; `accuracy_level` None runs the file as it is, `threads` 0 leaves the number to onnxruntime.

    Raises UnavailableError without the package, RefusedError when a file is missing or no decoder, FailedError when
    onnxruntime cannot load the model.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise unavailable(
            "the package onnxruntime is not installed", "run `pip install 'signround[onnx]'`", "onnx"
        ) from error
    from google.protobuf.message import DecodeError

    path = find_graph(folder)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise refuse(f"{path.name} is damaged", "export the artifact again", str(folder)) from error
    problem = data_problem(model, path.parent)
    if problem is not None:
        raise refuse(problem, "export the artifact again", str(folder))
    options = onnxruntime.SessionOptions()
    if accuracy_level is not None:
        set_accuracy_level(model, accuracy_level)
    if accuracy_level == 0 and _has_coarse_experts(model):
        options.add_session_config_entry(NO_PREPACKING, "1")
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads
    options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent.resolve()))
    levels = {attribute.i for attribute in _accuracy_levels(model)}
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        fused = _written_level(model) if accuracy_level is None else accuracy_level
        options.add_session_config_entry(FUSED_LEVEL, str(fused))
        levels.add(fused)
    try:
        # The graph goes in as bytes, its tensors stay in the folder (memory-mapped): no second file, no copy.
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except _ort_errors() as error:
        raise FailedError(
            f"{folder}: onnxruntime cannot load the model ({_first_line(error)}); `signround inspect` says more."
        ) from error
    written = "/".join(map(str, sorted(levels))) or "none"
    return OnnxRuntime(session, f"onnxruntime {onnxruntime.__version__}, accuracy_level {written}", folder)


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Set accuracy_level of every MatMulNBits and QMoE node, in place."""
    for attribute in _accuracy_levels(model):
        attribute.i = level


def _has_coarse_experts(model: onnx.ModelProto) -> bool:
    """Whether experts compute with int8 activations at every level: QMoE's packed kernels of 8 bits do. Not packed,
    their weights are decoded to float32 on each call: slow, and exact (measured with onnxruntime 1.31)."""
    experts = (node for node in model.graph.node if node.op_type == "QMoE")
    attributes = (attribute for node in experts for attribute in node.attribute)
    return any(attribute.name == "expert_weight_bits" and attribute.i == 8 for attribute in attributes)


def _accuracy_levels(model: onnx.ModelProto) -> Iterator[Any]:
    for node in model.graph.node:
        if node.op_type in LEVELLED:
            yield from (attribute for attribute in node.attribute if attribute.name == "accuracy_level")


def _written_level(model: onnx.ModelProto) -> int:
    return next((int(entry.value) for entry in model.metadata_props if entry.key == LEVEL_KEY), 4)


@dataclass(frozen=True)
class Cache:
    """Keys and values of a batch as onnxruntime holds them, in the order of the graph's inputs, and the attention mask
    of their tokens, int64 [batch, past]."""

    values: tuple[onnxruntime.OrtValue, ...]
    mask: Tensor


class OnnxRuntime:
    """A loaded decoder; fulfils `Runtime`, and takes steps on a cache."""

    affordable_positions: int | None = None

    def __init__(self, session: onnxruntime.InferenceSession, name: str, folder: Path) -> None:
        self.name = name
        self._session: onnxruntime.InferenceSession | None = session
        self._folder = folder
        inputs = {value.name: value for value in session.get_inputs()}
        self._past = {
            name: _sizes(value.shape, folder) for name, value in inputs.items() if name.startswith("past_key_values.")
        }
        self._dtypes = {name: DTYPES.get(inputs[name].type, "") for name in self._past}
        self._wants_positions = "position_ids" in inputs
        width = next((value.shape[-1] for value in session.get_outputs() if value.name == "logits"), None)
        if (
            not {"input_ids", "attention_mask"} <= inputs.keys()
            or not isinstance(width, int)
            or "" in self._dtypes.values()
            or (0, 0) in self._past.values()
        ):
            raise refuse(
                "the graph is not a decoder with input_ids, attention_mask, logits and a cache of float32 or fp16",
                "give a folder that `--to onnx` wrote",
                str(folder),
            )
        self.vocabulary = width

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """See `Runtime.logits`; a batch holds at most LOGIT_BYTES of logits, and at least one window."""
        _, tokens = windows.shape
        size = max(1, LOGIT_BYTES // (tokens * self.vocabulary * 4))
        for start in range(0, len(windows), size):
            yield self.step(windows[start : start + size])[0]

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """See `Runtime.speed`; keys and values stay where onnxruntime made them and are the next step's past."""
        tokens = any_tokens(prompt + new, self.vocabulary)

        def one_pass() -> tuple[float, float]:
            started = time.perf_counter()
            _, cache = self._stepped(torch.tensor([tokens[:prompt]]))
            read = time.perf_counter()
            for token in tokens[prompt:]:
                _, cache = self._stepped(torch.tensor([[token]]), cache)
            return read - started, time.perf_counter() - read

        return best_speed(one_pass, prompt, new)

    def step(self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Read `tokens` int64 [batch, tokens] after those of `cache` -> float32 logits [batch, tokens, vocabulary], and
        the cache with them. `mask` int64 like `tokens` is 0 where padding stands; where it may stand is the flavour's
        matter (contrib: at a row's end, without a cache), and so is a batch of several with a cache and several tokens.

        Raises FailedError when onnxruntime cannot run it.
        """
        logits, longer = self._stepped(tokens, cache, mask)
        return torch.from_numpy(logits.numpy()).float(), longer

    def _stepped(
        self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None
    ) -> tuple[onnxruntime.OrtValue, Cache]:
        """As `step`; keys and values stay where onnxruntime made them."""
        session = self._opened()
        mask = torch.ones_like(tokens) if mask is None else mask
        mask = mask if cache is None else torch.cat([cache.mask, mask], dim=1)
        values = self._empty(len(tokens)) if cache is None else cache.values
        binding = session.io_binding()
        for name, array in self._fed(tokens, mask).items():
            binding.bind_cpu_input(name, array)
        for name, value in zip(self._past, values, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(name.replace("past_key_values.", "present."), "cpu")
        binding.bind_output("logits", "cpu")
        try:
            session.run_with_iobinding(binding)
        except _ort_errors() as error:
            raise self._cannot_run(error) from error
        *present, logits = binding.get_outputs()  # in the order in which they were bound
        return logits, Cache(tuple(present), mask)

    def _fed(self, tokens: Tensor, mask: Tensor) -> dict[str, NDArray[np.int64]]:
        """What every call feeds beside keys and values; `mask` is that of past and tokens."""
        feeds = {"input_ids": tokens, "attention_mask": mask}
        if self._wants_positions:
            feeds["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return {name: tensor.contiguous().numpy() for name, tensor in feeds.items()}

    def _empty(self, batch: int) -> tuple[onnxruntime.OrtValue, ...]:
        import numpy as np
        from onnxruntime import OrtValue

        return tuple(
            OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), self._dtypes[name]))
            for name, (heads, size) in self._past.items()
        )

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise FailedError(f"{self._folder}: the runtime is closed.")
        return self._session

    def _cannot_run(self, error: Exception) -> FailedError:
        return FailedError(f"{self._folder}: onnxruntime cannot run the model ({_first_line(error)}).")

    def close(self) -> None:
        """See `Runtime.close`."""
        self._session = None


def _sizes(shape: Sequence[int | str | None], folder: Path) -> tuple[int, int]:
    """Heads and values of a head in one cache; (0, 0) when nobody says. The builder of onnxruntime-genai leaves the
    second out of the graph, genai_config.json has it."""
    heads, size = shape[1], shape[3]
    config = folder / "genai_config.json"
    if isinstance(heads, int) and not isinstance(size, int) and config.is_file():
        size = json.loads(config.read_text())["model"]["decoder"]["head_size"]
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else (0, 0)


def _ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: pybind exceptions that share no base, and RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), state.RuntimeException, state.EPFail, RuntimeError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
