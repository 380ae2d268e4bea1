"""What a run keeps of the dense structured model: inputs, and its outputs for them.

`verify` runs no code of the user's, so it compares with these. PyTorch computed the outputs, or
ONNX Runtime where an ONNX file was converted.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from structconv_cli.model.eval_mode import eval_mode
from structconv_cli.model.inventory import Inventory
from structconv_cli.model.signature import sized, tensors_of

BATCHES = {"batch 1": 1, "batch 2 (traced)": 2, "batch 5": 5}
"""Random inputs of the whole model; the export is traced with a batch of 2."""
REAL = "real inputs"
REAL_EXAMPLES = 8


def random_batches(fixed: int | None) -> Mapping[str, int]:
    """Sizes of the random inputs, by name, of a model that takes `fixed` examples at once."""
    return BATCHES if fixed is None else {f"batch {fixed}": fixed}


@torch.no_grad()
def record_reference(
    model: nn.Module,
    inventory: Inventory,
    real: Sequence[torch.Tensor],
    seed: int = 0,
    fixed: int | None = None,
) -> dict[str, torch.Tensor]:
    """Run the dense structured model on random and real inputs, and keep both sides.

    Args:
        model: the projected model, in float32.
        inventory: names and shapes.
        real: prepared inputs of the data; the first rows are used. What is not floating-point
            (class numbers, say) is taken from them in the random inputs too.
        seed: of the random inputs.
        fixed: the only batch size that the model takes; None for any.

    Returns:
        Every input and output as `SET.TENSOR`, a batch each.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = sized(real, fixed) if fixed else tuple(tensor[:REAL_EXAMPLES] for tensor in real)
    sets = {REAL: kept}
    for name, size in random_batches(fixed).items():
        sets[name] = tuple(
            torch.randn(size, *tensor.shape[1:], generator=generator, dtype=tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for tensor in sized(real, size)
        )
    record: dict[str, torch.Tensor] = {}
    with eval_mode(model):
        for name, inputs in sets.items():
            outputs = tensors_of(model(*inputs))
            record |= _kept(name, inventory.inputs, inputs)
            record |= _kept(name, inventory.outputs, outputs)
    return record


def _kept(
    name: str, names: Iterable[str], tensors: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    pairs = zip(names, tensors, strict=True)
    return {f"{name}.{tensor_name}": tensor.contiguous() for tensor_name, tensor in pairs}
