"""Running a graph from node to node on samples, holding what the rest of it still reads.

A layer is fitted to what it reads after all layers before it have changed. Running the graph from
its inputs for every layer would take time quadratic in the depth. Instead, the tensors that later
nodes read are held in memory wherever they fit, and runs start from the last place where they did.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from structconv_cli.onnx.graph import Graph, captured
from structconv_cli.onnx.probe import extract, run_fed, session
from structconv_cli.reconstruction.samples import Array, Feeds, Samples, images_per_run

_NUMBERS_RUN = 2**21
"""Numbers in the inputs of one run: inner tensors hold some ten times as many."""
_MOST_RUN = 64


def runs_of(model: onnx.ModelProto, samples: Samples) -> list[Feeds]:
    """Samples as feeds of a few images each: as many as the model is fixed to, or as suits memory.

    What does not fill a run of a model with a fixed batch is left out.
    """
    fixed = images_per_run(model)
    numbers = sum(array[0].size for array in samples.inputs.values())
    batch = fixed or int(np.clip(_NUMBERS_RUN // max(numbers, 1), 1, _MOST_RUN))
    last = samples.count - (samples.count % batch if fixed else 0)
    return [samples.part(slice(at, min(at + batch, last))).inputs for at in range(0, last, batch)]


class Stream:
    """A graph that is run piece by piece, and whose weights change ahead of where it has been run.

    Attributes:
        model: a copy of the graph, whose constants may be changed.
        held: for every run the tensors that runs start from; later ones may take their place.
    """

    def __init__(self, model: onnx.ModelProto, runs: Sequence[Feeds], threads: int) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = Graph(self.model)
        self.held: list[Feeds] = list(runs)
        self.threads = threads
        self._from_data = _dependent(self.graph)

    def live(self, index: int) -> list[str]:
        """Tensors that depend on data, are made before node `index`, and read by it or later."""
        nodes = self.graph.nodes
        made = {*self.graph.inputs, *(name for node in nodes[:index] for name in node.output)}
        read = dict.fromkeys(
            name for node in nodes[index:] for name in (*node.input, *captured(node))
        )
        wanted = [*read, *(name for name in self.graph.outputs if name not in read)]
        return [name for name in wanted if name in made and name in self._from_data]

    def values(self, tensors: Sequence[str]) -> Iterator[Feeds]:
        """These tensors, for every run. Runs may start from different places."""
        runtimes: dict[frozenset[str], onnxruntime.InferenceSession] = {}
        for feeds in self.held:
            wanted = [name for name in dict.fromkeys(tensors) if name not in feeds]
            if not wanted:
                yield feeds
                continue
            known = frozenset(feeds)
            if known not in runtimes:
                kinds = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in feeds.items()}
                part = extract(self.model, list(feeds), wanted, kinds)
                runtimes[known] = session(part, self.threads)
            found = run_fed(runtimes[known], feeds)
            made: dict[str, Array] = dict(zip(wanted, found, strict=True))
            yield {**{name: feeds[name] for name in tensors if name in feeds}, **made}

    def depends_on_data(self, tensor: str) -> bool:
        """Whether the inputs have a part in a tensor."""
        return tensor in self._from_data


def _dependent(graph: Graph) -> set[str]:
    """All tensors that the inputs have a part in; the others are constants of the graph."""
    found = set(graph.inputs)
    for node in graph.nodes:
        if found & {*node.input, *captured(node)}:
            found |= {name for name in node.output if name}
    return found
