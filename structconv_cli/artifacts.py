"""Writing a run's models to its folder, and reading them back for later steps."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import safetensors
import torch
from safetensors.torch import load_file, save

from structconv_cli import __version__
from structconv_cli.errors import OnnxError, RunFolderError
from structconv_cli.json_file import read_json
from structconv_cli.model.checkpoint import load_checkpoint
from structconv_cli.model.checkpoint_kind import Kind
from structconv_cli.model.inventory import Inventory
from structconv_cli.model.signature import TensorKind
from structconv_cli.onnx.file import load_onnx, set_metadata
from structconv_cli.onnx.lower import LoweredLayer, Lowering
from structconv_cli.onnx.probe import Array, dense_kernel, layer_nodes, run_fed, session
from structconv_cli.plan import Plan, read_plan
from structconv_cli.reference import REAL
from structconv_cli.run_folder import RunFolder
from structconv_cli.tasks.outputs import scores_index
from structconv_cli.verify import DENSE_GRAPH, PYTORCH, Artifacts
from structconv_cli.whole_graph import WholeGraph

PLAN_KEY = "structconv.plan_sha256"


def stamp(model: onnx.ModelProto, plan: Plan, lowered: Iterable[LoweredLayer]) -> None:
    """Record in an ONNX model which tool and plan made it, and every layer's structure."""
    forms = {entry.name: entry.form for entry in lowered}
    layers = {
        name: {"dense": s.dense, "reduced": s.reduced, "form": forms.get(name)}
        for name, s in plan.structures.items()
    }
    set_metadata(
        model,
        {
            "structconv.version": __version__,
            PLAN_KEY: plan.digest,
            "structconv.layers": json.dumps(layers),
        },
    )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, plan: Plan) -> None:
    """Write tensors as safetensors, stamped with the plan's digest (OSError if it cannot be)."""
    # Clones: safetensors refuses tensors that share memory.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(state, metadata={"format": "pt", PLAN_KEY: plan.digest}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        RunFolderError: the file is damaged or no safetensors file.
    """
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise RunFolderError(
            f"cannot read {path}: {error}. Run `structconv convert` again."
        ) from None


def load_artifacts(folder: RunFolder) -> Artifacts:
    """Read what `verify` needs; nothing read here is executed.

    Raises:
        RunFolderError: files are missing, damaged, or do not belong together.
        StructconvError: a file is not what its name says.
    """
    info = folder.info()
    plan = read_plan(folder.plan)
    artifacts = Artifacts(
        plan=plan,
        inventory=read_json(folder.inventory, Inventory),
        dense=load_checkpoint(folder.file(info, "dense weights")).tensors,
        reduced=load_tensors(folder.structured_weights),
        dense_onnx=load_onnx(folder.dense_onnx),
        structured_onnx=load_onnx(folder.structured_onnx),
        carried=read_json(folder.lowering, Lowering).carried,
        reference=load_tensors(folder.reference),
        computed_by=DENSE_GRAPH if info.kind == Kind.ONNX else PYTORCH,
    )
    stamps = {entry.key: entry.value for entry in artifacts.structured_onnx.metadata_props}
    for source, digest in (("run.json", info.plan_sha256), ("ONNX file", stamps.get(PLAN_KEY))):
        if digest != plan.digest:
            raise RunFolderError(
                f"the plan in {folder.plan} (sha256 {plan.digest[:12]}) is not the one that the "
                f"{source} was made from ({str(digest)[:12]}). Run `structconv convert` again."
            )
    _check_complete(folder, artifacts)
    return artifacts


def scores_of(model: onnx.ModelProto) -> Callable[[Array], Array]:
    """An ONNX model of one image input, as a function of images (B, C, H, W) to class scores."""
    graph = WholeGraph(model)
    index = scores_index(graph.outputs)
    return lambda images: np.asarray(
        graph({graph.inputs[0]: images})[graph.outputs[index]], np.float32
    )


def outputs_of(model: onnx.ModelProto, artifacts: Artifacts) -> dict[str, Array]:
    """What an ONNX model puts out, by name, for the real inputs that a run keeps.

    Raises:
        OnnxError: it does not run on them, or has other inputs or outputs.
    """
    if _ends(model) != _ends(artifacts.dense_onnx):
        raise OnnxError("the models' inputs or outputs differ, so they cannot be compared.")
    found = run_fed(session(model), artifacts.inputs(REAL))
    return dict(zip((value.name for value in model.graph.output), found, strict=True))


def _ends(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in (*model.graph.input, *model.graph.output)]


def _check_complete(folder: RunFolder, artifacts: Artifacts) -> None:
    specs = {layer.spec.name: layer.spec for layer in artifacts.inventory.layers}
    for name, structure in artifacts.plan.structures.items():
        if name not in specs:
            raise RunFolderError(
                f"{folder.inventory} does not describe layer {name} of the plan. Run `structconv "
                "convert` again."
            )
        outputs = specs[name].weight_shape[0]
        for what, tensors, sizes in (
            ("dense weights", artifacts.dense, structure.dense),
            ("structured weights", artifacts.reduced, structure.reduced),
        ):
            tensor = tensors.get(f"{name}.weight")
            found = None if tensor is None else tuple(tensor.shape)
            if found != (outputs, *sizes):
                raise RunFolderError(
                    f"the {what} in {folder.path} hold {name}.weight as {found}; the plan says "
                    f"{(outputs, *sizes)}. Run `structconv convert` again."
                )
    for name, nodes in layer_nodes(artifacts.dense_onnx, list(artifacts.plan.structures)).items():
        for node in nodes:
            shape = dense_kernel(artifacts.dense_onnx, node)[0].shape
            if shape != specs[name].weight_shape:
                raise RunFolderError(
                    f"{folder.dense_onnx} holds {name}.weight as {shape}; the plan says "
                    f"{specs[name].weight_shape}. Run `structconv convert` again."
                )
    _check_reference(folder, artifacts)


def _check_reference(folder: RunFolder, artifacts: Artifacts) -> None:
    inventory = artifacts.inventory
    # Those of the structured model are compared with the dense one's by `verify`.
    ends = _ends(artifacts.dense_onnx)
    if ends != [*inventory.inputs, *inventory.outputs]:
        raise RunFolderError(
            f"{folder.dense_onnx} has the inputs and outputs {', '.join(ends)}; {folder.inventory} "
            f"says {', '.join((*inventory.inputs, *inventory.outputs))}. Run `structconv convert` "
            "again."
        )
    for name in artifacts.sets:
        rows = set()
        for tensor_name, kind in (inventory.inputs | inventory.outputs).items():
            tensor = artifacts.reference.get(f"{name}.{tensor_name}")
            if tensor is None or TensorKind.of(tensor) != kind:
                raise RunFolderError(
                    f"{folder.reference} does not hold {tensor_name} of {name} as {kind.dtype} of "
                    f"shape {kind.shape}. Run `structconv convert` again."
                )
            rows.add(len(tensor))
        if len(rows) != 1 or 0 in rows:
            raise RunFolderError(
                f"{folder.reference} does not hold as many inputs as outputs for {name}. Run "
                "`structconv convert` again."
            )
