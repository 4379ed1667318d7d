"""Logits from onnxruntime: an exported folder, whose graph takes input_ids, attention_mask and past keys and values.

The accuracy_level of the file can be overridden for one session: at 0 the matrix products run in float32, which is the
oracle for what int8 activations (level 4) cost. Runs on the CPU; refuses graphs that are not such decoders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from signround.errors import FailedError, refuse
from signround.runtimes.onnx_files import find_graph
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed

if TYPE_CHECKING:
    import onnx
    import onnxruntime

LOGIT_BYTES = 128 * 2**20  # of one batch: windows are batched up to this
QUIET = 3  # log severity: errors only; they reach the caller as exceptions anyway
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_onnxruntime(folder: Path, accuracy_level: int | None = None, threads: int = 0) -> OnnxRuntime:
    """Load `folder`; `accuracy_level` None runs the file as it is, `threads` 0 leaves the number to onnxruntime.

    Raises RefusedError when the package or the file is missing, FailedError when onnxruntime cannot load the model.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise refuse(
            "the package onnxruntime is not installed", "run `pip install 'signround[onnx]'`", "onnx"
        ) from error
    from google.protobuf.message import DecodeError

    path = find_graph(folder)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise refuse(f"{path.name} is damaged", "export the artifact again", str(folder)) from error
    if accuracy_level is not None:
        set_accuracy_level(model, accuracy_level)
    levels = sorted({attribute.i for attribute in _accuracy_levels(model)})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads
    options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent.resolve()))
    try:
        # The graph goes in as bytes, its tensors stay in the folder (memory-mapped): no second file, no copy.
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except _ort_errors() as error:
        raise FailedError(f"{folder}: onnxruntime cannot load the model ({_first_line(error)}).") from error
    written = "/".join(map(str, levels)) or "none"
    return OnnxRuntime(session, f"onnxruntime {onnxruntime.__version__}, accuracy_level {written}", folder)


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Set accuracy_level of every MatMulNBits node, in place."""
    for attribute in _accuracy_levels(model):
        attribute.i = level


def _accuracy_levels(model: onnx.ModelProto) -> Iterator[Any]:
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield from (attribute for attribute in node.attribute if attribute.name == "accuracy_level")


class OnnxRuntime:
    """A loaded decoder; fulfils `Runtime`. One forward pass a batch of windows, without past."""

    affordable_positions: int | None = None

    def __init__(self, session: onnxruntime.InferenceSession, name: str, folder: Path) -> None:
        self.name = name
        self._session: onnxruntime.InferenceSession | None = session
        self._folder = folder
        shapes = {value.name: value.shape for value in session.get_inputs()}
        self._past = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        width = next((value.shape[-1] for value in session.get_outputs() if value.name == "logits"), None)
        if not {"input_ids", "attention_mask"} <= shapes.keys() or not isinstance(width, int):
            raise refuse(
                "the graph is not a decoder with input_ids, attention_mask and logits",
                "give a folder that `--to onnx` wrote",
                str(folder),
            )
        self.vocabulary = width

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """See `Runtime.logits`; a batch holds at most LOGIT_BYTES of logits, and at least one window."""
        _, tokens = windows.shape
        size = max(1, LOGIT_BYTES // (tokens * self.vocabulary * 4))
        for start in range(0, len(windows), size):
            yield self._forward(windows[start : start + size])

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """See `Runtime.speed`; keys and values stay where onnxruntime made them and are the next step's past."""
        tokens = any_tokens(prompt + new, self.vocabulary)

        def one_pass() -> tuple[float, float]:
            started = time.perf_counter()
            past, _ = self._step(tokens[:prompt], 0, None)
            read = time.perf_counter()
            for position in range(prompt, prompt + new):
                past, _ = self._step(tokens[position : position + 1], position, past)
            return read - started, time.perf_counter() - read

        return best_speed(one_pass, prompt, new)

    def _step(
        self, tokens: list[int], position: int, past: list[onnxruntime.OrtValue] | None
    ) -> tuple[list[onnxruntime.OrtValue], onnxruntime.OrtValue]:
        """Run one sequence's `tokens` from `position` on -> the new past, in the order of `self._past`, and logits."""
        import numpy as np
        from onnxruntime import OrtValue

        session = self._opened()
        if past is None:
            empty = {(1, heads, 0, size) for _, heads, _, size in self._past.values()}
            zeros = {shape: OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in empty}
            past = [zeros[1, heads, 0, size] for _, heads, _, size in self._past.values()]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, position + len(tokens)), np.int64))
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(name.replace("past_key_values.", "present."), "cpu")
        binding.bind_output("logits", "cpu")
        try:
            session.run_with_iobinding(binding)
        except _ort_errors() as error:
            raise self._cannot_run(error) from error
        *present, logits = binding.get_outputs()  # in the order in which they were bound
        return present, logits

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise FailedError(f"{self._folder}: the runtime is closed.")
        return self._session

    def _cannot_run(self, error: Exception) -> FailedError:
        return FailedError(f"{self._folder}: onnxruntime cannot run the model ({_first_line(error)}).")

    def _forward(self, batch: Tensor) -> Tensor:
        import numpy as np

        session = self._opened()
        count, _ = batch.shape
        feeds = {"input_ids": batch.numpy(), "attention_mask": np.ones(tuple(batch.shape), np.int64)}
        for name, (_, heads, _, size) in self._past.items():
            feeds[name] = np.zeros((count, heads, 0, size), np.float32)
        try:
            (logits,) = session.run(["logits"], feeds)
        except _ort_errors() as error:
            raise self._cannot_run(error) from error
        return torch.from_numpy(logits)

    def close(self) -> None:
        """See `Runtime.close`."""
        self._session = None


def _ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: pybind exceptions that share no base, and RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), state.RuntimeException, state.EPFail, RuntimeError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
