"""Whether a plan from a file fits a model."""

from collections.abc import Mapping

from structconv_cli.errors import PlanError
from structconv_cli.plan import KeptLayer, Plan


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
