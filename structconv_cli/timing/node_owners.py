"""Whose time a node's is: profiled nodes summed by what they were made for."""

import re
from collections.abc import Iterable, Mapping

import onnx

from structconv_cli.timing.node_times import NodeTime

_FUSED = re.compile(r"^fused |_nchwc$|/\w+Fusion/?$")
"""What ONNX Runtime's optimisers add to the names of nodes."""


def times_by_owner(
    nodes: Iterable[onnx.NodeProto], owners: Mapping[str, str], times: Iterable[NodeTime]
) -> dict[str, float]:
    """Times (ms) of profiled nodes, summed by owner.

    ONNX Runtime names a fused convolution after its last output; the time is the convolution's.
    Layout changes have no name of their own: they are counted to the node that runs next.

    Args:
        nodes: the nodes of the model as it was given to ONNX Runtime.
        owners: the owner of every node, by its first output.
        times: what the profiler found, in the order of running.
    """
    nodes = list(nodes)
    producers = {name: node for node in nodes for name in node.output}
    named = {node.name: node for node in nodes if node.name}
    sums: dict[str, float] = {}
    waiting = 0.0
    for entry in times:
        name = _FUSED.sub("", entry.name)
        node = producers.get(name) or named.get(name)
        if node is None:
            waiting += entry.ms
            continue
        while "Conv" in entry.op_type and node.op_type != "Conv":
            before = producers.get(node.input[0])
            if before is None:
                break
            node = before
        owner = owners[node.output[0]]
        sums[owner] = sums.get(owner, 0.0) + entry.ms + waiting
        waiting = 0.0
    return sums
