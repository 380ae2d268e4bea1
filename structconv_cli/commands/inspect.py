"""`structconv inspect`."""

from rich.console import Console

from structconv_cli import options
from structconv_cli.commands.failures import failures
from structconv_cli.commands.output import STANDARD_OUTPUT, check_outputs, put


def inspect(
    model: options.Model,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_shape: options.InputShape = None,
    trust_pickle: options.TrustPickle = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    batch_size: options.ImagesPerRun = 1,
    timings: options.Timings = None,
    json: options.Json = None,
) -> None:
    """List a model's layers, their shapes and costs, and each one's share of the time.

    Needs no data. Every layer is timed inside the whole model by ONNX Runtime's profiler.
    """
    with failures():
        from structconv_cli.commands.shapes import parse_shapes
        from structconv_cli.inspection import inspect_graph
        from structconv_cli.json_file import to_json
        from structconv_cli.model.architecture import Architecture, parse_arguments
        from structconv_cli.model.signature import INPUT
        from structconv_cli.model_graph import open_source
        from structconv_cli.onnx.example_inputs import example_inputs
        from structconv_cli.onnx.target import Target
        from structconv_cli.onnx.timing_cache import default_path
        from structconv_cli.report.inspection import inspect_report
        from structconv_cli.run_folder import RunFolder
        from structconv_cli.terminal import observer_for

        check_outputs(json=json)
        observer = observer_for(Console(stderr=True))
        target = Target(device, threads, batch_size)
        architecture = Architecture(arch, parse_arguments(arch_arg or [])) if arch else None
        shapes = parse_shapes(input_shape or [], only=INPUT)
        if (folder := RunFolder(model)).info_file.is_file():
            model = folder.structured_onnx
        with observer.stage("model"):
            source = open_source(model, architecture, observer, trust_pickle=trust_pickle)
            graph, notes = source.graph(shapes)
            feeds = example_inputs(graph, batch_size, shapes)
        result = inspect_graph(graph, target, feeds, timings or default_path(), observer)
        if json is not None:
            put(to_json(result), json)
        if json != STANDARD_OUTPUT:
            Console().print(inspect_report(result, notes))
