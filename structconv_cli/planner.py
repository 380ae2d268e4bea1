"""Choosing a structure for every layer: one rule for all, or a plan file checked against the model.

The rule structures every convolution but the first. What it keeps, it keeps with a reason. Choosing
layer by layer, by measured latency and accuracy, will replace the rule here.
"""

from collections.abc import Mapping

from structconv_cli.errors import PlanError
from structconv_cli.model.inventory import Inventory, TracedLayer
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


def check_plan(plan: Plan, axes: Mapping[str, tuple[int, ...]], refused: Mapping[str, str]) -> Plan:
    """Check a plan from a file against the model; layers that it does not name are kept.

    Args:
        plan: the plan.
        axes: (C / groups, *kernel) of the layers that can be structured, by name.
        refused: why the others cannot be.

    Raises:
        PlanError: the plan names layers that the model lacks or that cannot be structured, or
            structures that are not of its layers' shapes.
    """
    named = {entry.name: entry for entry in plan.layers}
    known = [*axes, *refused]
    strange = [name for name in named if name not in axes and name not in refused]
    if len(strange) == 1:
        raise PlanError(
            f"the plan names layer {strange[0]}, which the model does not have. Its layers: "
            f"{_some(known)}."
        )
    if strange:
        raise PlanError(_another_model(strange, [name for name in known if name not in named]))
    structures = plan.structures
    for name in structures:
        if name in refused:
            raise PlanError(
                f"the plan structures layer {name}, which cannot be: {refused[name]}. Give it a "
                '"reason" in place of its "structure".'
            )
    other = [name for name, found in structures.items() if found.dense != axes[name]]
    if len(other) == 1:
        raise PlanError(
            f"the plan gives layer {other[0]} the dense sizes {structures[other[0]].dense}; the "
            f"model's are {axes[other[0]]}."
        )
    if other:
        words = [f"{name}: {structures[name].dense} and {axes[name]}" for name in other[:3]]
        raise PlanError(
            f"the plan is for a model whose layers have other sizes: {len(other)} of "
            f"{len(structures)} differ (in the plan, and in the model): {'; '.join(words)}. Make "
            "the plan anew with `structconv plan`, or give the model that it was made for."
        )
    for name, found in structures.items():
        if found.is_dense:
            raise PlanError(
                f"the plan reduces nothing in layer {name}: {axes[name]}. Give it a smaller "
                'size on one axis, or a "reason" in place of its "structure".'
            )
    entries = [
        named.get(name, KeptLayer(name, refused.get(name, "not named in the plan file")))
        for name in known
    ]
    checked = Plan(tuple(entries))
    if not checked.structures:
        raise PlanError("the plan structures no layer at all; there is nothing to convert.")
    return checked


def _another_model(strange: list[str], missing: list[str]) -> str:
    lacks = f", and does not name {len(missing)} that it has ({_some(missing)})" if missing else ""
    return (
        f"the plan is for another model: it names {len(strange)} layers that this one does not "
        f"have ({_some(strange)}){lacks}. Make the plan anew with `structconv plan`, or correct "
        "the names."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


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
