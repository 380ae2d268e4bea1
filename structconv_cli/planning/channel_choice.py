"""Which channels a selection keeps, and in which order windows take them: from weights and data.

Both choices are made once for all readers of a tensor, whose filters count together, each reader's
as a share of its own output's size. With w_j the weights of channel j (of all filters and kernel
offsets of all readers, one long vector) and g = E[x x^T] the channels' second moments:

- *Selection* keeps the channels with the largest g_jj |w_j|^2.
- *Windows* with c = C/2 + 1 pair channels, whose weights must add up to a common S (`structure`).
  Moving w_a and w_b so that they do costs at least |w_a + w_b - S|^2 h_ab in the output, with
  h_ab = (g_aa g_bb - g_ab^2) / (g_aa + g_bb - 2 g_ab), the least of E(d_a x_a + d_b x_b)^2 over
  d_a + d_b = 1 (our derivation). So the best order pairs channels by a minimum-weight perfect
  matching, S being the mean over all pairs. It is approximated by an assignment, whose cycles are
  cut into pairs, and improved by exchanging partners as long as that gains; so is the order given,
  in case it leads to the better one.

Without data g is the identity.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from scipy.optimize import linear_sum_assignment

from structconv_cli.onnx.probe import session
from structconv_cli.reconstruction.samples import Feeds, images_per_run

Floats = npt.NDArray[np.float64]

_POSITIONS = 256
"""Pixels of each image that the moments are taken from."""
_PASSES = 50


def channel_moments(
    model: onnx.ModelProto, tensors: Collection[str], feeds: Feeds, *, threads: int, seed: int = 0
) -> dict[str, Floats]:
    """Second moments E[x x^T] (C, C) of tensors (B, C, ...), over images and pixels.

    Args:
        model: the graph.
        tensors: names in it.
        feeds: every input by name, images along the first axis. Those that do not fill a batch
            that the graph is fixed to are left out.
        threads: of ONNX Runtime.
        seed: of the pixels chosen.
    """
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    present = {value.name for value in exposed.graph.output}
    exposed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in tensors if name not in present
    )
    running = session(exposed, threads)
    rng = np.random.default_rng(seed)
    images = len(next(iter(feeds.values())))
    fixed = images_per_run(model)
    step = fixed or 8
    sums: dict[str, Floats] = {}
    counts = dict.fromkeys(tensors, 0)
    for start in range(0, images - (fixed or 1) + 1, step):
        batch = {name: array[start : start + step] for name, array in feeds.items()}
        values = running.run(list(tensors), batch)
        for name, value in zip(tensors, values, strict=True):
            pixels = np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
            most = _POSITIONS * step
            if len(pixels) > most:
                pixels = pixels[rng.choice(len(pixels), most, replace=False)]
            found = (pixels.T @ pixels).astype(np.float64)
            sums[name] = sums[name] + found if name in sums else found
            counts[name] += len(pixels)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def readers_filters(weights: Sequence[Floats], moments: Floats | None) -> Floats:
    """All readers' filters side by side, (C, K): each reader's scaled to one in all.

    Args:
        weights: of every reader, (C_out, C, *kernel).
        moments: E[x x^T] of what they read; None for the identity.
    """
    power = np.ones(weights[0].shape[1]) if moments is None else np.diag(moments)
    scaled = []
    for weight in weights:
        rows = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)
        size = float((power[:, None] * rows**2).sum()) ** 0.5
        scaled.append(rows / (size or 1.0))
    return np.concatenate(scaled, axis=1)


def select_channels(filters: Floats, moments: Floats | None, keep: int) -> tuple[int, ...]:
    """The channels to keep, in their own order.

    Args:
        filters: (C, K), see `readers_filters`.
        moments: E[x x^T] of the channels; None for the identity.
        keep: how many.
    """
    power = np.ones(len(filters)) if moments is None else np.diag(moments)
    scores = power * (filters**2).sum(1)
    kept = np.argsort(-scores, kind="stable")[:keep]
    return tuple(int(index) for index in np.sort(kept))


def pair_channels(filters: Floats, moments: Floats | None) -> tuple[int, ...]:
    """An order of C channels (C even) in which j and j + C/2 are partners.

    Arguments as for `select_channels`.
    """
    pairs = _matching(pair_costs(filters, moments))
    return tuple(a for a, _ in pairs) + tuple(b for _, b in pairs)


def pair_costs(filters: Floats, moments: Floats | None) -> Floats:
    """|w_a + w_b - S|^2 h_ab for all pairs of channels (C, C); infinite on the diagonal."""
    centred = filters - filters.mean(0)  # w_a + w_b - S, S being twice the mean
    squares = (centred**2).sum(1)
    costs = squares[:, None] + squares[None, :] + 2 * centred @ centred.T
    if moments is not None:
        costs = costs * _shared_power(moments)
    costs = np.maximum(costs, 0.0)
    np.fill_diagonal(costs, np.inf)
    found: Floats = costs
    return found


def _shared_power(moments: Floats) -> Floats:
    """h_ab for all pairs, as g_aa - (g_aa - g_ab)^2 / E(x_a - x_b)^2, a being the weaker channel.

    So nothing cancels where two channels are nearly the same, and h_ab is g_aa where they are.
    """
    power = np.diag(moments)
    weaker = np.minimum(power[:, None], power[None, :])
    spreads = power[:, None] + power[None, :] - 2 * moments
    tiny = np.finfo(np.float64).tiny
    shared = weaker - (weaker - moments) ** 2 / np.maximum(spreads, tiny)
    found: Floats = np.where(spreads > tiny, np.maximum(shared, 0.0), weaker)
    return found


def _matching(costs: Floats) -> list[tuple[int, int]]:
    """A perfect matching of small weight, at most that of the pairs (j, j + C/2)."""
    finite = np.where(np.isfinite(costs), costs, 0.0)
    middle = len(costs) // 2

    def total(pairs: list[tuple[int, int]]) -> float:
        return float(sum(finite[a, b] for a, b in pairs))

    given = [(j, j + middle) for j in range(middle)]
    found = _exchanged(_assigned(finite), finite)
    return found if total(found) <= total(given) else _exchanged(given, finite)


def _assigned(finite: Floats) -> list[tuple[int, int]]:
    """The cycles of the cheapest assignment, cut into pairs."""
    blocked = finite.copy()
    np.fill_diagonal(blocked, finite.sum() + 1.0)
    _, successors = linear_sum_assignment(blocked)
    pairs: list[tuple[int, int]] = []
    left: list[int] = []
    seen: set[int] = set()
    for start in range(len(finite)):
        cycle = []
        node = start
        while node not in seen:
            seen.add(node)
            cycle.append(node)
            node = int(successors[node])
        if len(cycle) % 2:
            left.append(cycle.pop())
        ways = [list(zip(cycle[i::2], (cycle[1:] + cycle[:1])[i::2], strict=True)) for i in (0, 1)]
        pairs += min(ways, key=lambda way: sum(finite[a, b] for a, b in way))
    return [*pairs, *zip(left[::2], left[1::2], strict=True)]


def _exchanged(pairs: list[tuple[int, int]], costs: Floats) -> list[tuple[int, int]]:
    """Exchange partners between the two pairs that gain most, until nothing gains."""
    first, second = (np.array(side, int) for side in zip(*pairs, strict=True))

    def ways(i: int) -> tuple[Floats, Floats]:
        """Costs of pair i with every other, partners exchanged in both ways: (a, d), (c, b), and
        (a, c), (b, d)."""
        a, b = first[i], second[i]
        return costs[a, second] + costs[first, b], costs[a, first] + costs[b, second]

    def gain(i: int) -> Floats:
        now = costs[first, second]
        found: Floats = now[i] + now - np.minimum(*ways(i))
        found[i] = 0.0
        return found

    gains = np.stack([gain(i) for i in range(len(first))])
    least = 1e-9 * float(costs[first, second].sum())
    for _ in range(_PASSES * len(first)):
        i, j = (int(index) for index in np.unravel_index(int(gains.argmax()), gains.shape))
        if gains[i, j] <= least:
            break
        crossed, parallel = ways(i)
        if crossed[j] <= parallel[j]:
            second[i], second[j] = second[j], second[i]
        else:
            second[i], first[j] = first[j], second[i]
        for changed in (i, j):  # no other pair's gain with a third has changed
            gains[changed] = gains[:, changed] = gain(changed)
    return [(int(a), int(b)) for a, b in zip(first, second, strict=True)]
