"""Weights inside structured subspaces from a few hundred unlabelled samples, without training.

With an ONNX graph (dense, batch norms folded):

    found = reconstruct(graph, structures, samples)
    structured = apply_to_graph(graph, found)

With a PyTorch model, through the graph that it is exported to:

    graph = export_onnx(model, example)
    settings = ReconstructionSettings(without_bias=layers_without_bias(model, graph))
    found = reconstruct(graph, structures, samples, settings)
    left = apply_to_module(model, graph, found)

`samples` are `Samples({input name: prepared images})`; None projects the weights, and
`found.notes` says that the accuracy is unmeasured. `found.record` is data for the run folder.
Afterwards the module computes what the changed graph computes, so batch norm need not be
re-estimated, unless `left` names layers whose shift had no place. Doing it all the same can cost
more than the structures do (`benchmarks/README.md`).

- `samples`, `activations`: what data looks like, and the moments of what layers read.
- `least_squares`: one layer by itself, all others as they are; what the planner predicts from.
- `asymmetric`, `sequential`: all layers, each on what the changed ones before it make.
- `apply`: the new weights put back.
"""
