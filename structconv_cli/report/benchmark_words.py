"""What a benchmark found, in words: the same on the terminal, in Markdown and on a page."""

from structconv_cli.benchmarking.result import BenchmarkedModel, BenchmarkResult, Quality
from structconv_cli.report.text import count
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import FASTER, SLOWER, TOO_FEW_ROUNDS, Speedup

ADVICE = "Keep the original here, or convert again with other --n, --channels or --plan."


def verdict(speedup: Speedup) -> str:
    """'structured is 1.81 times as fast as original'."""
    candidate, baseline = speedup.candidate, speedup.baseline
    if speedup.verdict == FASTER:
        return f"{candidate} is {speedup.median:.2f} times as fast as {baseline}"
    if speedup.verdict == SLOWER:
        return f"{candidate} is slower than {baseline}: {speedup.median:.2f} times as fast"
    if speedup.verdict == TOO_FEW_ROUNDS:
        return f"too few rounds to compare {candidate} with {baseline}"
    return f"{candidate} shows no significant difference from {baseline}"


def evidence(speedup: Speedup) -> str:
    """'median of paired rounds 1.81, 95 % interval 1.80 to 1.82'."""
    if speedup.low is None or speedup.high is None:
        return f"median of paired rounds {speedup.median:.2f}, no interval"
    return (
        f"median of paired rounds {speedup.median:.2f}, {100 * speedup.confidence:.0f} % interval "
        f"{speedup.low:.2f} to {speedup.high:.2f}"
    )


def setting_text(setting: SettingResult) -> str:
    """'2 threads, batch 8'."""
    return f"{count(setting.threads, 'thread')}, batch {setting.batch_size}"


def circumstances(result: BenchmarkResult) -> str:
    """Where and how the models were measured, in one paragraph."""
    machine, protocol = result.environment, result.protocol
    shapes = ", ".join("x".join(map(str, s)) for s in _shapes(result))
    rounds = sum(len(setting.blocks) for setting in result.settings)
    blocks = sum(len(set(setting.blocks)) for setting in result.settings)
    held = f", held to cores {machine.affinity}" if machine.affinity else ""
    return (
        f"{machine.cpu}, {count(machine.cores, 'core')}; {machine.provider} of ONNX Runtime "
        f"{machine.onnxruntime}, spinning {'on' if machine.spinning else 'off'}{held}; input "
        f"{shapes} ({protocol.input}); {count(rounds, 'round')} in random order, each model in its "
        f"own process, started anew {count(blocks, 'time')}."
    )


def score_text(model: BenchmarkedModel, quality: Quality | None) -> str:
    """'99.78 %'; nothing where it was not judged."""
    if model.score is None or quality is None:
        return ""
    return f"{model.score:.2f}{' ' + quality.unit if quality.unit else ''}"


def notes(result: BenchmarkResult) -> list[str]:
    """What a reader must know before trusting the figures, one sentence each."""
    found = []
    if result.partial:
        found.append("Interrupted: these figures are partial, of the rounds till then.")
    several = len(result.settings) > 1
    for setting in result.settings:
        place = f"{setting_text(setting)}: " if several else ""
        found += [f"{place}{warning}" for warning in setting.warnings]
    return [*found, *result.failures]


def _shapes(result: BenchmarkResult) -> list[tuple[int, ...]]:
    found = [shape for setting in result.settings for shape in setting.input_shapes.values()]
    return list(dict.fromkeys(found))
