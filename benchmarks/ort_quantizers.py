"""onnxruntime's own weight quantisers (`onnxruntime.quantization.matmul_nbits_quantizer`), as their users call them.

    python -m benchmarks.ort_quantizers METHOD FLOAT_FOLDER OUT --bits 4 --block 32 [--calibration windows.npy]

FLOAT_FOLDER holds a float decoder (model.onnx of the onnxruntime-genai builder at -p fp32); OUT gets model.onnx and its
data. Every MatMul is quantised but the head, which `hide_head` turned into an operator that no quantiser touches (GPTQ
ignores `nodes_to_exclude`). Known limits of onnxruntime 1.31: RTN, k-quant and GPTQ pack 4 bits only; at 2 bits they
leave rounded floats in a MatMul (its accuracy is the method's, its size is not), and k-quant is then plain rounding.
HQQ has float zero points. K-quant always has zero points.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRAPH, DATA = "model.onnx", "model.onnx.data"
HEAD = "/lm_head/MatMul"


def hide_head(folder: Path) -> None:
    """Turn the head into com.microsoft FusedMatMul: the same product under a name that no quantiser looks for."""
    import onnx

    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    (head,) = (node for node in model.graph.node if node.name == HEAD)
    head.op_type, head.domain = "FusedMatMul", "com.microsoft"
    if all(entry.domain != head.domain for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(head.domain, 1))
    onnx.save(model, str(folder / GRAPH))


def feeds(model: Any, windows: NDArray[np.int64]) -> Iterator[dict[str, NDArray[Any]]]:
    """The inputs of one window after the other, without past."""
    past = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    for window in windows:
        feed: dict[str, NDArray[Any]] = {
            "input_ids": window[None],
            "attention_mask": np.ones((1, len(window)), np.int64),
        }
        for value in past:
            _, heads, _, size = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            feed[value.name] = np.zeros((1, heads, 0, size), np.float32)
        yield feed


def _default(model: Any, bits: int, block: int, symmetric: bool) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    return DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)


def _hqq(model: Any, bits: int, block: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig

    return HQQWeightOnlyQuantConfig(block_size=block, bits=bits)


def _weight_config(model: Any, bits: int) -> dict[str, dict[str, int]]:
    return {node.name: {"bits": bits} for node in model.graph.node if node.op_type == "MatMul"}


def _rtn(model: Any, bits: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import RTNWeightOnlyQuantConfig

    return RTNWeightOnlyQuantConfig(customized_weight_config=_weight_config(model, bits))


def _k_quant(model: Any, bits: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig

    return KQuantWeightOnlyQuantConfig(customized_weight_config=_weight_config(model, bits))


def _gptq(model: Any, bits: int, windows: NDArray[np.int64]) -> Any:
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig

    class Windows(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = list(feeds(model, windows))

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return self._left.pop(0) if self._left else None

    config = GPTQWeightOnlyQuantConfig(calibration_data_reader=Windows())
    config.customized_weight_config = _weight_config(model, bits)
    return config


Configure = Callable[[Any, int, int, NDArray[np.int64]], Any]
METHODS: dict[str, tuple[Configure, bool]] = {
    "DEFAULT sym": (lambda model, bits, block, _: _default(model, bits, block, True), True),
    "DEFAULT asym": (lambda model, bits, block, _: _default(model, bits, block, False), False),
    "RTN sym": (lambda model, bits, block, _: _rtn(model, bits), True),
    "RTN asym": (lambda model, bits, block, _: _rtn(model, bits), False),
    "k-quant": (lambda model, bits, block, _: _k_quant(model, bits), False),
    "HQQ": (lambda model, bits, block, _: _hqq(model, bits, block), False),
    "GPTQ sym": (lambda model, bits, block, windows: _gptq(model, bits, windows), True),
    "GPTQ asym": (lambda model, bits, block, windows: _gptq(model, bits, windows), False),
}
CALIBRATED = ("GPTQ sym", "GPTQ asym")


def quantize(
    method: str, source: Path, out: Path, bits: int, block: int, windows: NDArray[np.int64] | None = None
) -> None:
    """Write `out` (a new folder) with the quantised graph of `source`."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.WARNING)
    configure, symmetric = METHODS[method]
    model = onnx.load(str(source / GRAPH))
    config = configure(model, bits, block, np.empty((0, 0), np.int64) if windows is None else windows)
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=block, is_symmetric=symmetric, algo_config=config)
    quantizer.process()
    out.mkdir(parents=True)
    onnx.save(
        quantizer.model.model,
        str(out / GRAPH),
        save_as_external_data=True,
        location=DATA,
        size_threshold=1024,
        convert_attribute=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--calibration", type=Path, help="int64 [windows, tokens], for GPTQ")
    args = parser.parse_args()
    windows = np.load(args.calibration) if args.calibration else None
    with contextlib.redirect_stdout(sys.stderr):
        quantize(args.method, args.source, args.out, args.bits, args.block, windows)


if __name__ == "__main__":
    main()
