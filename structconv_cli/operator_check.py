"""Does a lowered graph apply a dense operator (a node that is no layer)? By structure, and by runs.

- Where every part of the output is made by the very operator, with the same attributes, from the
  same parts of its inputs and those parts' shares of its constants, it is the dense one for every
  input, given that it works on each channel alone. That is what the lowering says of it
  (`onnx.roles`); so that it need not be believed, the operator is run once on noise.
- Any other is run on what the dense graph makes of real inputs, and on noise of several scales,
  small and far beyond any bound that it may have.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import torch

from structconv_cli.claims import Claims
from structconv_cli.errors import OnnxError
from structconv_cli.exactness import Check, compare
from structconv_cli.onnx.channels import Channels
from structconv_cli.onnx.graph import Graph, attributes, captured
from structconv_cli.onnx.nodes import layer_of
from structconv_cli.onnx.probe import part_session, run_fed
from structconv_cli.onnx.roles import Carry, role_of
from structconv_cli.samples import Values
from structconv_cli.tolerance import SAFETY

OPERATOR = "ONNX operator"

Array = npt.NDArray[np.generic]

_SCALES = (0.01, *(8.0**power for power in range(8)))
_USUAL = 8.0
_STATISTICS = ("Normalization", "Softmax", "CumSum", "LRN")
"""What the names of operators say that sum over a tensor and keep its shape."""


def check_operator(claims: Claims, node: onnx.NodeProto, given: Sequence[Values]) -> Check:
    """Check one node of the dense graph that is no layer.

    Args:
        claims: the two graphs.
        node: the node.
        given: samples of its inputs; noise takes their place if there are none.

    Raises:
        OnnxError: the lowered graph cannot be run there, or a claim cannot be true.
    """
    names = [name for name in (*node.input, *captured(node)) if name]
    names = [name for name in dict.fromkeys(names) if not claims.dense.is_constant(name)]
    real: list[Values] = [{name: sample[name] for name in names} for sample in given]
    real = real or [_assumed(claims.dense, names)]
    checks: list[Check] = []
    if same_structure(claims, node):
        runs = [*_noise(real[-1:], (_USUAL,)), (real[-1], True)]
    else:
        runs = [*((values, True) for values in real), *_noise(real, _SCALES)]
    outputs = _outputs(claims.dense, node)
    targets = [tensor for name in outputs for tensor, _ in claims.sources(name)]
    dense = part_session(claims.dense.model, real[0], outputs)
    lowered = part_session(claims.lowered.model, claims.stand_ins(real[0]), targets)
    for values, required in runs:
        try:
            expected = dict(zip(outputs, run_fed(dense, values), strict=True))
        except OnnxError:
            # Not all noise is an input that the operator takes.
            if required:
                raise
            continue
        read = claims.stand_ins(values)
        found = run_fed(lowered, read)
        checks.append(_compare(claims, node, {**values, **read}, expected, found))
        if not checks[-1].passed:
            return checks[-1]
    return max(checks, key=lambda check: check.error or 0.0)


def same_structure(claims: Claims, node: onnx.NodeProto) -> bool:
    """Whether each part of the output is made by the very operator from the inputs' same parts.

    Raises:
        OnnxError: a claim cannot be true.
    """
    role = role_of(claims.dense, node)
    if not isinstance(role, Carry) or role.flattens or role.group > 1 or captured(node):
        return False
    for target, channels in claims.sources(node.output[0]):
        other = claims.lowered.producers.get(target)
        if other is None or not _same_operator(node, other) or other.output[0] != target:
            return False
        if not (channels.is_selection or role.linear):
            return False
        inputs = zip(node.input, other.input, strict=True)
        for position, (name, tensor) in enumerate(inputs):
            if not _same_input(claims, role, position, name, tensor, channels):
                return False
    return True


def _same_operator(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    same = (one.op_type, one.domain) == (other.op_type, other.domain)
    return same and len(one.input) == len(other.input) and _settings(one) == _settings(other)


def _settings(node: onnx.NodeProto) -> list[bytes]:
    return sorted(a.SerializeToString(deterministic=True) for a in node.attribute)


def _same_input(
    claims: Claims, role: Carry, position: int, name: str, tensor: str, channels: Channels
) -> bool:
    """Whether a tensor holds, of a dense operator's input, what this part of its output needs."""
    if position in role.tied:
        return (tensor, channels) in claims.sources(name)
    one, other = claims.dense.constant(name), claims.lowered.constant(tensor)
    if one is None or other is None:
        return name == tensor and name not in claims.carried and one is other
    if position in role.sliced:
        one = channels.apply(one, role.sliced[position]).astype(one.dtype)
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def _assumed(dense: Graph, names: Sequence[str]) -> Values:
    """Noise at the sizes that a graph declares, where it cannot be run: open axes are short."""
    rng = np.random.default_rng(0)
    values = {}
    for name in names:
        shape = dense.shape(name)
        if shape is None:
            raise OnnxError(f"the shape of {name} is not known, and the dense graph does not run.")
        sizes = [size or (7 if axis else 2) for axis, size in enumerate(shape)]
        values[name] = rng.standard_normal(sizes).astype(np.float32)
    return values


def _noise(samples: Sequence[Values], scales: Sequence[float]) -> Iterator[tuple[Values, bool]]:
    """Samples with noise in place of all real numbers, at several scales; none is required."""
    rng = np.random.default_rng(0)
    for values in samples:
        if any(x.dtype.kind == "f" for x in values.values()):
            for scale in scales:
                yield {n: _scattered(x, scale, rng) for n, x in values.items()}, False


def _scattered(x: Array, scale: float, rng: np.random.Generator) -> Array:
    if x.dtype.kind != "f":
        return x
    noise: Array = (scale * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)
    return noise


def _outputs(dense: Graph, node: onnx.NodeProto) -> list[str]:
    """Those of a node's outputs that are read."""
    read = [name for name in node.output if name in dense.readers or name in dense.outputs]
    return read or list(node.output[:1])


def _compare(
    claims: Claims,
    node: onnx.NodeProto,
    values: Values,
    outputs: Mapping[str, Array],
    found: Sequence[Array],
) -> Check:
    """Compare what the lowered graph makes of a node's inputs to what stands for its outputs.

    Args:
        claims: the two graphs.
        node: of the dense one.
        values: all that was read, in either graph.
        outputs: what the dense node made.
        found: what the lowered graph did.
    """
    subject = layer_of(node) or node.output[0]
    expected = claims.stand_ins(outputs)
    apart, bounds = [], []
    # Sums of channels that stand for a tensor may be far larger than what is in it.
    involved = (*values.values(), *outputs.values(), *expected.values())
    scale = max(map(_largest, involved), default=0.0)
    for (tensor, right), part in zip(expected.items(), found, strict=True):
        if part.shape != right.shape or part.dtype != right.dtype:
            raise OnnxError(
                f"the shape of {tensor} is {part.shape} ({part.dtype}), not {right.shape} "
                f"({right.dtype})."
            )
        allowed = 0.0
        if right.dtype.kind == "f":
            terms = _terms(claims.dense, node, values, right)
            u = float(np.finfo(str(right.dtype)).eps) / 2
            allowed = SAFETY * (4 + math.sqrt(terms)) * u * scale
        same = (part == right) | ((part != part) & (right != right))
        difference = np.subtract(
            part, right, dtype=np.float64, where=~same, out=np.zeros(part.shape)
        )
        apart.append(difference.ravel())
        bounds.append(np.full(difference.size, allowed))
    names = ", ".join(outputs)
    deviation = torch.from_numpy(np.concatenate(apart))
    return compare(subject, OPERATOR, deviation, torch.from_numpy(np.concatenate(bounds)), names)


def _largest(x: Array) -> float:
    """The largest finite magnitude."""
    if x.dtype.kind != "f":
        return 0.0
    return float(np.abs(np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)).max(initial=0.0))


def _terms(dense: Graph, node: onnx.NodeProto, values: Values, output: Array) -> int:
    """How many summands an output of a pool, a reduction or a product has, at most."""
    sizes = [x.size for x in values.values()]
    weights = [dense.constant(name) for name in node.input]
    kernel = attributes(node).get("kernel_shape")
    summed = [-(-size // max(output.size, 1)) for size in sizes]
    if isinstance(kernel, list):
        summed.append(math.prod(int(k) for k in kernel))
    if any(word in node.op_type for word in _STATISTICS):
        summed += sizes
    if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        summed += [w.size // max(w.shape[0], 1) for w in weights if w is not None and w.ndim > 1]
        summed += [x.shape[-1] for x in values.values() if x.ndim]
    return max(summed, default=1)
