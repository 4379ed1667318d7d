"""What onnxruntime's CPU kernel makes of one node by itself: how weights are decoded without our packer.

Knows nothing of weights. The node computes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


def output_of(
    node: onnx.NodeProto,
    constants: Sequence[onnx.TensorProto],
    fed: Mapping[str, NDArray[Any]],
    versions: tuple[int, int] = (21, 10),
) -> Tensor:
    """The one output of `node`, whose inputs are `constants` and `fed` by their names. `versions`: of the default
    operator set and of the file format; no higher than the node needs, so that older runtimes take it."""
    import onnxruntime
    from onnx import TensorProto, helper

    (output,) = node.output
    graph = helper.make_graph(
        [node],
        "single_node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in fed.items()
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        constants,
    )
    opset, ir_version = versions
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(fed))
    return torch.from_numpy(found)
