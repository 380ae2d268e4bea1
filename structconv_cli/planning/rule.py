"""One rule for all layers: every convolution but the first gets the same structure, where it can.

What it keeps, it keeps with a reason. Structures chosen layer by layer are `proposal`'s.
"""

from structconv_cli.errors import PlanError
from structconv_cli.model.inventory import FROZEN, Inventory, TracedLayer
from structconv_cli.plan import KeptLayer, LayerPlan, Plan
from structconv_cli.structure import Structure


def rule_plan(inventory: Inventory, n: int = 2, channels: float = 1.0) -> Plan:
    """One structure for all: kernels to `n` per spatial axis, input channels to a fraction.

    Args:
        inventory: the model's layers.
        n: spatial size of the reduced kernel (kernels no larger than `n` keep their size).
        channels: fraction of the input channels kept as differences; c = channels * C + 1, since
            one more channel carries the common sum. 1 leaves the channels alone.

    Raises:
        PlanError: an argument is out of range, or no layer of the model is eligible.
    """
    if n < 1:
        raise PlanError(f"--n must be at least 1; found {n}.")
    if not 0 < channels <= 1:
        raise PlanError(f"--channels must be above 0 and at most 1; found {channels}.")
    entries: list[LayerPlan | KeptLayer] = []
    first = next((x.spec.name for x in inventory.layers if x.spec.kind != "linear"), None)
    for layer in inventory.layers:
        name = layer.spec.name
        if name == first:
            reason = "first convolution: few input channels, and the most sensitive"
            entries.append(KeptLayer(name, reason))
        elif layer.frozen:
            entries.append(KeptLayer(name, FROZEN))
        else:
            entries.append(_rule(layer, n, channels))
    entries += [KeptLayer(x.name, x.reason) for x in inventory.unsupported]
    plan = Plan(tuple(entries))
    if not plan.structures:
        reasons = "; ".join(f"{kept.name}: {kept.reason}" for kept in plan.kept[:5])
        raise PlanError(
            f"no layer of this model is eligible for n={n}, channels={channels}: "
            f"{reasons or 'it has no convolution or linear layer'}. Try another --n or --channels, "
            "or name layers in a plan file (--plan)."
        )
    return plan


def _rule(layer: TracedLayer, n: int, channels: float) -> LayerPlan | KeptLayer:
    spec = layer.spec
    if spec.kind == "linear":
        return KeptLayer(spec.name, "linear layer: structured only when a plan file names it")
    if spec.is_depthwise:
        reason = "depthwise: each filter would need a sum-pool of its own, so nothing is shared"
        return KeptLayer(spec.name, reason)
    inputs, *kernel = spec.axes
    kept_inputs = min(inputs, round(channels * inputs) + 1)
    structure = Structure(spec.axes, (kept_inputs, *(min(n, size) for size in kernel)))
    if structure.is_dense:
        size = "x".join(map(str, kernel))
        reason = f"{size} kernel: no larger than n={n} on any axis"
        return KeptLayer(spec.name, reason + ("; see --channels" if channels == 1 else ""))
    return LayerPlan(spec.name, structure)
