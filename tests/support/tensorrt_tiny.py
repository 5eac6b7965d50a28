"""Graphs of a few nodes under an expert's names, which TensorRT builds in a second."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def patch_graph(
    path, *, free=True, model="wan2.2-i2v-a14b", sizes=(1, 21, 90, 160), operator=None, scale=2.0
):
    """A patch embedding like an expert's: Conv over `[B, 36, F, H, W]`, then a product."""
    names = ("batch", "latent_frames", "latent_height", "latent_width")
    batch, *rest = names if free else sizes
    weight = numpy_helper.from_array(np.full((4, 36, 1, 2, 2), 0.01, np.float32), "patch_embedding.weight")
    factor = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    nodes = [
        helper.make_node(
            "Conv",
            ["hidden_states", "patch_embedding.weight"],
            ["patched"],
            name="patch_embedding/node_conv3d",
            strides=[1, 2, 2],
            kernel_shape=[1, 2, 2],
        ),
        helper.make_node(
            operator or "Mul",
            ["patched"] if operator else ["patched", "scale"],
            ["velocity"],
            name="blocks.7.attn1.to_q/node_x",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "expert",
        [helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, [batch, 36, *rest])],
        [helper.make_tensor_value_info("velocity", TensorProto.FLOAT, [None] * 5)],
        [weight] if operator else [weight, factor],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if model:
        helper.set_model_props(made, {"model": model, "component": "expert_high"})
    onnx.save(made, path)
    return path


def attention_graph(path):
    """One Attention of opset 23 in float32, which TensorRT for RTX has no kernel for that computes it whole."""
    names, shape = ("query", "key", "value"), [1, 4, 32, 16]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "mixed")]
    node = helper.make_node("Attention", list(names), ["mixed"], name="blocks.3.attn1/node_attention")
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path
