"""A cheap backend for torch.compile that counts graphs and what is compiled once in them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig


class CountingBackend:
    """Runs graphs uncompiled and counts them. transformers deep-copies what it is given.

    Attributes:
        graphs: how many there were.
        regions: of the last one, the name of what each call of a region runs.
        moving: of the last one, the names of tensors that a CUDA graph would copy in each step,
            because nobody says that they stay where they are.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.regions: list[str] = []
        self.moving: list[str] = []

    def __deepcopy__(self, memo: object) -> "CountingBackend":
        return self

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        calls = graph.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.invoke_subgraph
        )
        self.regions = [call.args[1] for call in calls]
        self.moving = [
            given.name
            for given in graph.graph.find_nodes(op="placeholder")
            if given.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is None
        ]
        return graph.forward


def compiled(backend: object, *, fullgraph: bool = True) -> Any:
    """What ``generate`` needs to compile on any device."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    return config
