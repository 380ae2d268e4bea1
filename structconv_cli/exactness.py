"""Is the rewrite exact, layer by layer? Structured layer against dense layer, in PyTorch.

Only rounding may separate them; how much rounding can do follows from the dtype and the number of
summands (`tolerance`). Nothing here knows how a structured layer was made: it sees weights, a
description of the dense layer, and inputs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import ConfigDict
from torch import nn

from structconv_cli.layer_spec import LayerSpec, pad_input
from structconv_cli.layers import structured_layer
from structconv_cli.structure import Structure
from structconv_cli.tolerance import bias_bound, layer_bound, stored_weight_bound


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        subject: the layer's name, or what was fed to the whole model.
        what: what was compared.
        error: the largest deviation measured against what is allowed there (absolute for layers,
            relative to the largest output for the whole model); None if it is not finite.
        tolerance: what is allowed at that place.
        passed: whether every deviation stayed within its tolerance.
        detail: where and why it failed; empty if it passed.
    """

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    subject: str
    what: str
    error: float | None
    tolerance: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's two forms.

    Attributes:
        spec: the dense layer.
        structure: its subspace.
        dense: weight (C_out, *structure.dense).
        reduced: weight (C_out, *structure.reduced).
        bias: (C_out,) or None, of the dense form.
        reduced_bias: likewise, of the structured form.
    """

    spec: LayerSpec
    structure: Structure
    dense: torch.Tensor
    reduced: torch.Tensor
    bias: torch.Tensor | None
    reduced_bias: torch.Tensor | None


def check_layer(
    layer: LayerWeights, inputs: Mapping[str, torch.Tensor], *, padded: bool = False
) -> list[Check]:
    """Compare the two forms' weights, and their outputs in float64 and float32.

    Args:
        layer: the two forms.
        inputs: inputs of the layer by the name under which results are listed; (B, C_in, *spatial),
            or (B, Q) for a linear layer. "random" may be among them, see `random_input`.
        padded: whether the inputs carry the layer's padding already.
    """
    checks = [_check_weights(layer)]
    spec = replace(layer.spec, padding=((0, 0),) * layer.spec.dims) if padded else layer.spec
    for name, x in inputs.items():
        for dtype in (torch.float64, torch.float32):
            what = f"{str(dtype).removeprefix('torch.')}, {name} input"
            checks.append(_check_outputs(layer, spec, x, dtype, what))
    return checks


def check_kept(
    what: str,
    names: Iterable[str],
    structures: Iterable[str],
    dense: Mapping[str, torch.Tensor],
    structured: Mapping[str, torch.Tensor],
) -> Check:
    """Check that tensors of no structured layer are the same in both forms, to the bit.

    The subject is the first layer that has another tensor, or "all others".
    """
    rewritten = {f"{name}.weight" for name in structures}
    for name in names:
        if name in rewritten or name.endswith("num_batches_tracked"):
            continue
        one, other = dense.get(name), structured.get(name)
        if one is None or other is None or not torch.equal(one, other):
            detail = f"{name} differs between the dense and the structured form"
            return Check(name.rpartition(".")[0] or name, what, None, 0.0, False, detail)
    return Check("all others", what, 0.0, 0.0, True)


def random_input(spec: LayerSpec, generator: torch.Generator) -> torch.Tensor:
    """Normal noise for a layer: batch 2, a few pixels wider than the kernel's reach."""
    if spec.kind == "linear":
        return torch.randn(2, spec.weight_shape[1], generator=generator, dtype=torch.float64)
    size = [
        d * (n - 1) + 1 + 4 * s
        for n, d, s in zip(spec.weight_shape[2:], spec.dilation, spec.stride, strict=True)
    ]
    channels = spec.weight_shape[1] * spec.groups
    return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)


def compare(
    subject: str, what: str, deviation: torch.Tensor, allowed: torch.Tensor, describe: str
) -> Check:
    """A check that every element of `deviation` is at most its element of `allowed`.

    NaN and infinity fail, and so does an empty tensor.
    """
    deviation, allowed = deviation.abs().double(), allowed.double().expand(deviation.shape)
    if not deviation.numel():
        return Check(subject, what, None, 0.0, False, f"{describe} is empty")
    fits = torch.isfinite(deviation) & (deviation <= allowed)
    share = torch.nan_to_num(deviation / allowed, nan=1e300, posinf=1e300)
    share = torch.where(torch.isfinite(deviation), share, torch.inf)
    # 0 of 0 allowed is no share at all; and whatever does not fit comes before all that fits.
    worst = int(torch.where(fits, torch.where(deviation == 0, 0.0, share), 1 + share).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), deviation.shape))
    error, limit = float(deviation.flatten()[worst]), float(allowed.flatten()[worst])
    if fits.all():
        return Check(subject, what, error, limit, True)
    if not math.isfinite(error):
        count = int((~torch.isfinite(deviation)).sum())
        detail = f"{describe} is not finite at {place} ({count} values)"
        return Check(subject, what, None, limit, False, detail)
    detail = f"{describe} differs by {error:.3g} at {place}; rounding explains {limit:.3g}"
    return Check(subject, what, error, limit, False, detail)


def _check_weights(layer: LayerWeights) -> Check:
    dense = layer.dense.double()
    deviation = dense - layer.structure.expand(layer.reduced.double())
    allowed = stored_weight_bound(layer.dense, layer.reduced, layer.structure)
    check = compare(layer.spec.name, "weights", deviation, allowed, "the expanded weight")
    one, other = layer.bias, layer.reduced_bias
    same = one is other if one is None or other is None else torch.equal(one, other)
    if check.passed and not same:
        return replace(check, passed=False, detail="the structured layer's bias differs")
    return check


def _check_outputs(
    layer: LayerWeights, spec: LayerSpec, x: torch.Tensor, dtype: torch.dtype, what: str
) -> Check:
    structured = structured_layer(spec, layer.structure).to(dtype)
    with torch.no_grad():
        structured.weight.copy_(layer.reduced)
        if structured.bias is not None and layer.reduced_bias is not None:
            structured.bias.copy_(layer.reduced_bias)
        # The same rounded input for both, so that only the layers' arithmetic differs.
        x = x.to(dtype)
        deviation = structured(x).double() - dense_output(
            spec, layer.dense.double(), layer.bias, x.double()
        )
        bound = layer_bound(layer.dense, layer.reduced, layer.structure, dtype)
        slack = None
        if layer.bias is not None:
            slack = bias_bound(layer.bias, layer.structure, dtype)
        allowed = dense_output(spec, bound, slack, x.double().abs())
    allowed = allowed + torch.finfo(dtype).tiny
    return compare(spec.name, what, deviation, allowed, "the output")


def dense_output(
    spec: LayerSpec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """The dense layer's output for a padded-as-described input, in the weight's dtype."""
    bias = bias.to(weight.dtype) if bias is not None else None
    if spec.kind == "linear":
        return nn.functional.linear(x, weight, bias)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spec.dims - 1]
    return convolve(pad_input(x, spec), weight, bias, spec.stride, 0, spec.dilation, spec.groups)
