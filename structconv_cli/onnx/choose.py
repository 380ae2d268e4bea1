"""Choosing among a graph's alternatives by measuring them on this machine's ONNX Runtime.

Every layer is timed in every form it can take, and every space both whole and in parts, *in place*:
the whole model is written a handful of times, each time with all of its layers in the same form,
and ONNX Runtime's profiler says what each layer took, with its real neighbours, layouts and caches.
That is one run of the model for all layers together, not one for each layer and form. The sums tell
for every space whether carrying it in parts pays, and for every layer which form is fastest.

What nodes cost is not quite additive (a layer that reads parts also makes parts), so the best
combination is finally timed against the dense model and against the uniform ones, whole and
interleaved, and the fastest of them is taken: the result is never slower than the dense model
beyond noise.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime

from structconv_cli.onnx.alternatives import Alternatives, Choice, Unit
from structconv_cli.onnx.forms import Form
from structconv_cli.onnx.measure import Measure, Variant
from structconv_cli.onnx.target import Target
from structconv_cli.onnx.timing_cache import TimingCache
from structconv_cli.progress import SILENT, Observer
from structconv_cli.timing.execution_provider import require_provider

_DENSE = "dense"
_SPLIT = "split"


def choose(
    alternatives: Alternatives,
    target: Target,
    feeds: Mapping[str, npt.NDArray[np.generic]],
    cache: TimingCache,
    observer: Observer = SILENT,
) -> tuple[Choice, Mapping[str, float]]:
    """The fastest choice, and the whole model's times (ms) that decided.

    Args:
        alternatives: what is possible.
        target: where it is to be fast.
        feeds: an input of the real shapes, by name.
        cache: times known from earlier runs; new ones are added.
        observer: is told of the alternatives measured.
    """
    require_provider(target.device, onnxruntime.get_available_providers())
    measure = Measure(alternatives, target, feeds, cache)
    uniform = _uniform(alternatives)
    variants: dict[str, Variant] = {}
    for done, (name, choice) in enumerate(uniform.items()):
        variants[name] = measure.in_place(choice)
        observer.steps(done + 1, len(uniform) + 1)
    best = _combine(alternatives, variants)
    finalists = {
        name: v.rebuilt.model for name, v in variants.items() if name in (_DENSE, _SPLIT, "average")
    }
    chosen = measure.rebuild(best)
    totals = measure.whole({**finalists, "combined": chosen.model})
    observer.steps(len(uniform) + 1, len(uniform) + 1)
    winner = min(totals, key=lambda name: totals[name])
    return (best if winner == "combined" else uniform[winner]), totals


def _uniform(alternatives: Alternatives) -> dict[str, Choice]:
    """The alternatives in which all layers have the same form."""
    free = tuple(unit for unit in alternatives.units if unit.is_free)
    layers = alternatives.layers.values()
    spatial = any(layer.is_spatial for layer in layers)
    channels = any(layer.need for layer in layers)
    space = "average" if spatial else "dense"
    found = {_DENSE: alternatives.choice((), Form())}
    if spatial:
        found["average"] = alternatives.choice(free, Form("dense", "average"))
        found["ones"] = alternatives.choice(free, Form("dense", "ones"))
    if channels:
        found["banded"] = alternatives.choice(free, Form("banded", space))
        found["sliced"] = alternatives.choice(free, Form("sliced", space))
    if alternatives.units:
        found[_SPLIT] = alternatives.choice(alternatives.units, Form("dense", space))
    return found


def _combine(alternatives: Alternatives, variants: Mapping[str, Variant]) -> Choice:
    """Every unit whole or in parts, every layer in its fastest form, by the times in place."""
    spaces, layers = alternatives.spaces, alternatives.layers
    local = {name: variant for name, variant in variants.items() if name != _SPLIT}
    dense = variants[_DENSE]

    def fastest(output: str) -> Variant:
        return min(local.values(), key=lambda variant: variant.ms.get(output, 0.0))

    def pays(unit: Unit) -> bool:
        inside = {t for space in spaces if space.name in unit.parts for t in space.tensors}
        readers = [n.output[0] for n in spaces.graph.nodes if inside & set(n.input)]
        split = sum(variants[_SPLIT].ms.get(output, 0.0) for output in readers)
        whole = sum((fastest(o) if o in layers else dense).ms.get(o, 0.0) for o in readers)
        return split < whole

    taken = tuple(unit for unit in alternatives.units if unit.is_free or pays(unit))
    choice = alternatives.choice(taken, Form())
    forms = {
        output: (variants[_SPLIT] if form.channels == "split" else fastest(output)).choice.forms[
            output
        ]
        for output, form in choice.forms.items()
    }
    return Choice(choice.parts, forms)
