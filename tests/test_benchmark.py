import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pydantic import TypeAdapter

from structconv_cli.errors import BenchmarkError
from structconv_cli.timing.affinity import parse_affinity
from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark
from structconv_cli.timing.conditions import Conditions, drift
from structconv_cli.timing.environment import allowed_cores
from structconv_cli.timing.given_inputs import fit_inputs, read_inputs
from structconv_cli.timing.model_timing import size_on_disk
from structconv_cli.timing.setting_result import SettingResult
from structconv_cli.timing.speedup import MINIMUM_ROUNDS, RESOLUTION, compare_rounds

SHORT = BenchmarkSettings(rounds=MINIMUM_ROUNDS, round_ms=1, warmup_ms=1)

quick = settings(max_examples=30, deadline=None)

REPOSITORY = Path(__file__).parent.parent


def save_conv(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("N", 3, 8, 8),
    dtype: int = TensorProto.FLOAT,
    input_name: str = "image",
    external_data: bool = False,
) -> Path:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "weight"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info(input_name, dtype, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if external_data:
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def save_expand(path: Path, elements: int) -> Path:
    """A model of little input whose output has `elements` elements."""
    graph = helper.make_graph(
        [helper.make_node("Expand", ["image", "shape"], ["output"])],
        "expand",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1, elements], dtype=np.int64), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    return save_conv(tmp_path / "conv.onnx")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    OTHERS[:] = psutil.Process().children()
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


OTHERS: list[psutil.Process] = []
"""Children of this process that earlier tests started: the server of `forked`."""


def own_workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process not in OTHERS]


class TestCompareRounds:
    figures = st.lists(
        st.tuples(st.floats(0.01, 1000), st.floats(0.01, 1000)), min_size=6, max_size=30
    )

    @quick
    @given(figures)
    def test_interval_is_ordered_and_within_the_ratios(
        self, pairs: list[tuple[float, float]]
    ) -> None:
        baseline, candidate = zip(*pairs, strict=True)
        ratios = [b / c for b, c in pairs]
        found = compare_rounds("a", "b", baseline, candidate)
        low, high = min(ratios) * (1 - 1e-9), max(ratios) * (1 + 1e-9)
        assert found.low is not None
        assert found.high is not None
        assert low <= found.low <= found.high <= high
        assert low <= found.median <= high
        assert found.confidence == 0.95

    @quick
    @given(figures, st.integers(-20, 20))
    def test_scaling_both_changes_nothing(
        self, pairs: list[tuple[float, float]], exponent: int
    ) -> None:
        baseline, candidate = zip(*pairs, strict=True)
        scale = 2.0**exponent
        scaled = compare_rounds(
            "a", "b", [b * scale for b in baseline], [c * scale for c in candidate]
        )
        assert scaled == compare_rounds("a", "b", baseline, candidate)

    @quick
    @given(figures)
    def test_swapping_inverts(self, pairs: list[tuple[float, float]]) -> None:
        baseline, candidate = zip(*pairs, strict=True)
        there = compare_rounds("a", "b", baseline, candidate)
        back = compare_rounds("b", "a", candidate, baseline)
        assert (back.baseline, back.candidate) == ("b", "a")
        assert back.median == pytest.approx(1 / there.median)
        assert there.low is not None
        assert there.high is not None
        assert back.low == pytest.approx(1 / there.high)
        assert back.high == pytest.approx(1 / there.low)
        borders = (there.low, there.high, there.median * RESOLUTION, there.median / RESOLUTION)
        if not any(math.isclose(border, 1, rel_tol=1e-9) for border in borders):
            opposite = {"faster": "slower", "slower": "faster"}
            assert back.verdict == opposite.get(there.verdict, there.verdict)

    @quick
    @given(st.lists(st.floats(0.01, 1000), min_size=6, max_size=30))
    def test_identical_figures_are_no_difference(self, figures: list[float]) -> None:
        found = compare_rounds("a", "b", figures, figures)
        assert (found.median, found.low, found.high) == (1, 1, 1)
        assert found.verdict == "no significant difference"

    @quick
    @given(st.lists(st.floats(0.9, 1.1), min_size=5, max_size=30), st.integers(0, 9))
    def test_half_the_time_is_twice_as_fast(self, noise: list[float], seed: int) -> None:
        # Ratios in pairs around 2, so that 2 is their median whatever the noise.
        baseline = [2.0 * n for n in noise] + [2.0 / n for n in noise]
        found = compare_rounds("a", "b", baseline, [1.0] * len(baseline), seed)
        assert found.median == pytest.approx(2)
        assert found.low is not None
        assert found.high is not None
        assert found.low * (1 - 1e-9) <= 2 <= found.high * (1 + 1e-9)
        assert found.verdict == "faster"

    def test_one_slow_round_does_not_matter(self) -> None:
        found = compare_rounds("a", "b", [1.0] * 29 + [100.0], [1.0] * 30)
        assert found.median == 1
        assert found.verdict == "no significant difference"

    def test_a_difference_beneath_the_resolution_is_none(self) -> None:
        found = compare_rounds("a", "b", [1.005] * 30, [1.0] * 30)
        assert found.low is not None
        assert found.low > 1
        assert found.verdict == "no significant difference"

    def test_median_of_an_odd_number_is_the_middle_ratio(self) -> None:
        found = compare_rounds("a", "b", [1, 2, 3, 4, 5, 6, 7], [1.0] * 7)
        assert found.median == pytest.approx(4)

    def test_interval_covers_the_true_ratio_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        covered = 0
        for seed in range(200):
            baseline = (1.2 * rng.lognormal(0, 0.05, 30)).tolist()
            found = compare_rounds("a", "b", baseline, rng.lognormal(0, 0.05, 30).tolist(), seed)
            assert found.low is not None
            assert found.high is not None
            covered += found.low <= 1.2 <= found.high
        assert 175 <= covered <= 200

    def test_luck_of_processes_is_no_difference(self) -> None:
        """Every block has a ratio of its own, far wider than the noise of its rounds."""
        rng = np.random.default_rng(0)
        wrong = naive = 0
        blocks = np.repeat(np.arange(6), 5)
        for seed in range(200):
            luck = np.repeat(rng.lognormal(0, 0.03, 6), 5)
            baseline = (luck * rng.lognormal(0, 0.005, 30)).tolist()
            candidate = rng.lognormal(0, 0.005, 30).tolist()
            found = compare_rounds("a", "b", baseline, candidate, seed, blocks.tolist())
            wrong += found.verdict != "no significant difference"
            alone = compare_rounds("a", "b", baseline, candidate, seed)
            naive += alone.verdict != "no significant difference"
        assert wrong <= 10
        assert naive > 40

    def test_a_difference_that_every_block_shows_is_one(self) -> None:
        rng = np.random.default_rng(0)
        blocks = np.repeat(np.arange(6), 5).tolist()
        luck = np.repeat(rng.lognormal(0, 0.01, 6), 5)
        baseline = (1.3 * luck * rng.lognormal(0, 0.02, 30)).tolist()
        candidate = rng.lognormal(0, 0.02, 30).tolist()
        assert compare_rounds("a", "b", baseline, candidate, 0, blocks).verdict == "faster"
        assert compare_rounds("b", "a", candidate, baseline, 0, blocks).verdict == "slower"

    def test_blocks_may_be_of_different_lengths(self) -> None:
        blocks = [0, 0, 0, 1, 1, 2, 2, 2, 2]
        found = compare_rounds("a", "b", [2.0] * 9, [1.0] * 9, 0, blocks)
        assert (found.median, found.low, found.high) == pytest.approx((2, 2, 2))

    @pytest.mark.parametrize("rounds", [1, 5])
    def test_too_few_rounds_give_no_verdict(self, rounds: int) -> None:
        found = compare_rounds("a", "b", [3.0] * rounds, [1.0] * rounds)
        assert found.median == pytest.approx(3)
        assert (found.low, found.high) == (None, None)
        assert found.verdict == "too few rounds"

    @pytest.mark.parametrize(
        ("baseline", "candidate"),
        [
            ([], []),
            ([1.0] * 5, [1.0] * 6),
            ([1.0] * 5, [1.0] * 4 + [0.0]),
            ([1.0] * 5, [1.0] * 4 + [math.nan]),
        ],
    )
    def test_bad_figures(self, baseline: list[float], candidate: list[float]) -> None:
        with pytest.raises(BenchmarkError):
            compare_rounds("a", "b", baseline, candidate)


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("threads", 0),
            ("batch_size", 0),
            ("rounds", 0),
            ("blocks", 0),
            ("duration_s", 0.0),
            ("duration_s", math.inf),
            ("seed", -1),
            ("round_ms", 0.0),
            ("round_ms", math.nan),
            ("warmup_ms", -1.0),
            ("warmup_ms", math.inf),
        ],
    )
    def test_impossible_settings(self, name: str, value: object) -> None:
        with pytest.raises(BenchmarkError, match=name):
            BenchmarkSettings(**{name: value})  # type: ignore[arg-type]

    @given(st.integers(1, 40), st.integers(1, 40))
    def test_blocks_share_the_rounds(self, rounds: int, blocks: int) -> None:
        settings = BenchmarkSettings(rounds=rounds, blocks=blocks)
        shares = [settings.rounds_in(block) for block in range(settings.block_count)]
        assert sum(shares) == rounds
        assert min(shares) >= 1
        assert max(shares) - min(shares) <= 1
        assert len(shares) == min(rounds, blocks)


class TestResult:
    def test_three_models(self, tmp_path: Path, conv: Path) -> None:
        other = save_conv(tmp_path / "other.onnx")
        models = {"one": conv, "two": other, "again": conv}
        settings = BenchmarkSettings(batch_size=2, threads=2, rounds=6, round_ms=1, warmup_ms=1)
        turns: list[tuple[int, int]] = []
        result = benchmark(models, settings, progress=lambda done, all_: turns.append((done, all_)))

        assert (result.threads, result.batch_size) == (2, 2)
        assert result.blocks == (0,) * 6
        assert not result.partial
        assert result.input_shapes == {"image": (2, 3, 8, 8)}
        assert [model.name for model in result.models] == ["one", "two", "again"]
        assert turns == [(done, 21) for done in range(1, 22)]
        for model in result.models:
            assert model.load_ms > 0
            assert model.warmup_ms >= 1
            assert 0 < model.p50_ms <= model.p90_ms <= model.p95_ms <= model.p99_ms
            assert model.peak_memory_bytes is not None
            assert 0 < model.peak_memory_bytes < 2**28
            assert model.throughput == pytest.approx(2 / (model.mean_ms / 1e3))
            assert len(model.round_ms) == 6
            assert min(model.round_ms) <= model.p50_ms <= max(model.round_ms)
            assert model.runs >= 18
            assert model.runs % 6 == 0
        assert [(s.baseline, s.candidate) for s in result.speedups] == [
            ("one", "two"),
            ("one", "again"),
        ]
        for speedup, model in zip(result.speedups, result.models[1:], strict=True):
            assert speedup == compare_rounds(
                "one",
                model.name,
                result.models[0].round_ms,
                model.round_ms,
                blocks=result.blocks,
            )

        adapter = TypeAdapter(SettingResult)
        assert adapter.validate_json(adapter.dump_json(result)) == result

    def test_one_model_has_no_speedup(self, conv: Path) -> None:
        result = benchmark({"only": conv}, SHORT)
        assert len(result.models) == 1
        assert result.speedups == ()

    def test_batch_axis_may_be_fixed_at_the_batch_size(self, tmp_path: Path) -> None:
        file = save_conv(tmp_path / "fixed.onnx", shape=(1, 3, 8, 8))
        assert benchmark({"a": file}, SHORT).input_shapes == {"image": (1, 3, 8, 8)}

    @pytest.mark.parametrize(
        "dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.INT64]
    )
    def test_input_types(self, tmp_path: Path, dtype: int) -> None:
        file = save_conv(tmp_path / "typed.onnx", dtype=dtype)
        assert benchmark({"a": file}, SHORT).models[0].runs >= 3 * MINIMUM_ROUNDS

    def test_size_includes_external_weights(self, tmp_path: Path) -> None:
        file = save_conv(tmp_path / "graph.onnx", external_data=True)
        weights = (tmp_path / "weights.bin").stat().st_size
        assert weights >= 4 * 3 * 3 * 3 * 4
        assert size_on_disk("a", file) == file.stat().st_size + weights

    def test_working_directory_cannot_shadow_the_workers_imports(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_conv(tmp_path / "conv.onnx")
        (tmp_path / "numpy.py").write_text("raise RuntimeError('imported by mistake')")
        monkeypatch.chdir(tmp_path)
        # An empty entry stands for the working directory, and pytest or python -c may have set it.
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
        assert len(benchmark({"a": Path("conv.onnx")}, SHORT).models) == 1

    def test_each_block_starts_processes_anew(self, conv: Path) -> None:
        seen: set[int] = set()

        def look(done: int, turns: int) -> None:
            seen.update(process.pid for process in own_workers())
            assert turns == 2 + 5

        settings = BenchmarkSettings(rounds=5, blocks=2, round_ms=1, warmup_ms=1)
        result = benchmark({"a": conv}, settings, progress=look)
        assert result.blocks == (0, 0, 0, 1, 1)
        assert len(seen) == 2

    def test_a_time_in_place_of_rounds(self, conv: Path) -> None:
        settings = BenchmarkSettings(duration_s=0.4, blocks=2, round_ms=5, warmup_ms=1)
        start = time.perf_counter()
        result = benchmark({"a": conv}, settings)
        assert time.perf_counter() - start >= 0.4
        assert set(result.blocks) == {0, 1}

    def test_the_baseline_may_be_any(self, tmp_path: Path, conv: Path) -> None:
        models = {"a": conv, "b": conv, "c": conv}
        result = benchmark(models, SHORT, baseline="b")
        pairs = [(s.baseline, s.candidate) for s in result.speedups]
        assert pairs == [("b", "a"), ("b", "c")]

    def test_an_interruption_keeps_whole_rounds(self, conv: Path) -> None:
        """In the third round one of two models has had its turn."""

        def interrupt(done: int, turns: int) -> None:
            if done == 2 + 2 * 2 + 1:
                raise KeyboardInterrupt

        models = {"a": conv, "b": conv}
        result = benchmark(models, SHORT, progress=interrupt, keep_interrupted=True)
        assert result.partial
        assert [len(model.round_ms) for model in result.models] == [2, 2]
        assert len(result.blocks) == 2
        assert result.speedups[0].verdict == "too few rounds"
        with pytest.raises(KeyboardInterrupt):
            benchmark(models, SHORT, progress=interrupt)

    def test_without_a_round_an_interruption_is_one(self, conv: Path) -> None:
        def interrupt(done: int, turns: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            benchmark({"a": conv}, SHORT, progress=interrupt, keep_interrupted=True)

    def test_more_threads_than_cores_are_warned_of(self, conv: Path) -> None:
        core = min(allowed_cores())
        few = BenchmarkSettings(threads=2, rounds=1, round_ms=1, warmup_ms=1, affinity=(core,))
        assert "share 1 core" in " ".join(benchmark({"a": conv}, few).warnings)

    def test_models_stay_on_their_cores(self, conv: Path) -> None:
        core = max(allowed_cores())
        seen: list[list[int]] = []

        def look(done: int, turns: int) -> None:
            seen.extend(process.cpu_affinity() for process in own_workers())

        settings = BenchmarkSettings(rounds=1, round_ms=1, warmup_ms=1, affinity=(core,))
        benchmark({"a": conv}, settings, progress=look)
        assert seen
        assert all(cores == [core] for cores in seen)


class TestConditions:
    def test_drift_is_seen(self) -> None:
        assert drift([1.0] * 10 + [1.5] * 10) == pytest.approx(1.5)
        assert drift([1.0] * 20) == 1
        assert drift([1.0] * 5) is None

    def test_what_matters_is_said(self) -> None:
        quiet = Conditions(1.0, 0.01, 1.01, ())
        assert quiet.warnings() == ()
        (load,) = Conditions(1.0, 1.5, 1.0, ()).warnings()
        assert "1.5 cores" in load
        (slow,) = Conditions(1.0, 0.0, 1.3, ()).warnings()
        assert "30% slower" in slow
        assert "throttles" in slow
        (fast,) = Conditions(1.0, None, 0.8, ()).warnings()
        assert "faster" in fast

    def test_a_busy_process_is_seen(self, conv: Path) -> None:
        settings = BenchmarkSettings(duration_s=1.5, round_ms=5, warmup_ms=1)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burning:
            try:
                found = benchmark({"a": conv}, settings).conditions
            finally:
                burning.kill()
        assert found.other_load is not None
        assert found.other_load > 0.2
        assert len(found.reference_ms) >= 1


class TestGivenInputs:
    def test_rows_reach_the_model(self, tmp_path: Path, conv: Path) -> None:
        file = tmp_path / "rows.npy"
        np.save(file, np.zeros((3, 3, 8, 8), np.float32))
        settings = BenchmarkSettings(rounds=1, round_ms=1, warmup_ms=1, batch_size=5)
        result = benchmark({"a": conv}, settings, given=read_inputs(file))
        assert result.input_shapes == {"image": (5, 3, 8, 8)}

    def test_arrays_go_by_name(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.npz"
        np.savez(file, b=np.ones((4, 2)), a=np.zeros((4, 3)))
        fitted = fit_inputs(read_inputs(file), {"a": (2, 3), "b": (2, 2)}, "it")
        assert {name: array.shape for name, array in fitted.items()} == {"a": (2, 3), "b": (2, 2)}
        assert fitted["b"].all()

    @pytest.mark.parametrize(
        ("array", "told"),
        [
            (np.zeros((3, 3, 9, 9)), r"\(3, 9, 9\).*takes \(3, 8, 8\)"),
            (np.zeros((0, 3, 8, 8)), "one row for each example"),
            (np.array(["a"]), "array of numbers"),
            (np.float32(1), "one row"),
        ],
    )
    def test_what_does_not_fit(
        self, tmp_path: Path, conv: Path, array: np.ndarray, told: str
    ) -> None:
        np.save(tmp_path / "rows.npy", array)
        given = read_inputs(tmp_path / "rows.npy")
        with pytest.raises(BenchmarkError, match=told):
            benchmark({"a": conv}, SHORT, given=given)

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.npy"
        for content in (b"", b"nothing of the kind"):
            file.write_bytes(content)
            with pytest.raises(BenchmarkError, match=r"rows\.npy cannot be read"):
                read_inputs(file)
        np.save(file, np.array([{}]), allow_pickle=True)
        with pytest.raises(BenchmarkError, match=r"rows\.npy cannot be read"):
            read_inputs(file)


class TestAffinity:
    def test_lists_and_ranges(self) -> None:
        cores = sorted(allowed_cores())
        assert parse_affinity("") == ()
        assert parse_affinity(str(cores[0])) == (cores[0],)
        assert parse_affinity(f"{cores[-1]},{cores[0]}") == tuple(sorted({cores[0], cores[-1]}))

    @pytest.mark.parametrize("text", ["a", "1-", "-1", "0,", "99999", "0-99999999999", "5-4"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(BenchmarkError, match=text):
            parse_affinity(text)


class TestBadInput:
    def test_no_model(self) -> None:
        with pytest.raises(BenchmarkError, match="at least one"):
            benchmark({}, SHORT)

    def test_missing_file(self, tmp_path: Path, conv: Path) -> None:
        with pytest.raises(BenchmarkError, match=r"missing\.onnx"):
            benchmark({"a": conv, "b": tmp_path / "missing.onnx"}, SHORT)

    @pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(range(256))])
    def test_garbage(self, tmp_path: Path, conv: Path, content: bytes) -> None:
        garbage = tmp_path / "garbage.onnx"
        garbage.write_bytes(content)
        with pytest.raises(BenchmarkError, match=r"'b' .*garbage\.onnx.* cannot be") as caught:
            benchmark({"a": conv, "b": garbage}, SHORT)
        assert "\n" not in str(caught.value)

    def test_truncated_model(self, tmp_path: Path, conv: Path) -> None:
        truncated = tmp_path / "truncated.onnx"
        truncated.write_bytes(conv.read_bytes()[:-200])
        with pytest.raises(BenchmarkError, match=r"truncated\.onnx"):
            benchmark({"a": truncated}, SHORT)

    def test_symbolic_axis_other_than_the_batch(self, tmp_path: Path) -> None:
        file = save_conv(tmp_path / "free.onnx", shape=("N", 3, "H", "W"))
        with pytest.raises(BenchmarkError, match=r"free\.onnx.*'image'.* axis 2, 3"):
            benchmark({"a": file}, SHORT)

    def test_other_fixed_batch(self, tmp_path: Path) -> None:
        file = save_conv(tmp_path / "fixed.onnx", shape=(4, 3, 8, 8))
        with pytest.raises(BenchmarkError, match=r"fixed batch axis of 4.* batch size of 1"):
            benchmark({"a": file}, SHORT)

    def test_unsupported_type(self, tmp_path: Path) -> None:
        file = save_conv(tmp_path / "bool.onnx", dtype=TensorProto.BOOL)
        with pytest.raises(BenchmarkError, match=r"'image' has type tensor\(bool\)"):
            benchmark({"a": file}, SHORT)

    @pytest.mark.parametrize("change", [{"shape": ("N", 3, 9, 9)}, {"input_name": "picture"}])
    def test_models_for_other_inputs(self, tmp_path: Path, conv: Path, change: object) -> None:
        other = save_conv(tmp_path / "other.onnx", **change)  # type: ignore[arg-type]
        with pytest.raises(BenchmarkError, match=r"other\.onnx.* the same input names and shapes"):
            benchmark({"a": conv, "b": other}, SHORT)

    @pytest.mark.skipif(
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
        reason="this ONNX Runtime has the provider that the test wants to be missing",
    )
    def test_missing_provider(self, conv: Path) -> None:
        settings = BenchmarkSettings(provider="cuda")
        with pytest.raises(BenchmarkError, match=r"CPUExecutionProvider.*onnxruntime-gpu"):
            benchmark({"a": conv}, settings)

    def test_input_too_large_for_memory(self, conv: Path) -> None:
        settings = BenchmarkSettings(batch_size=10**12)
        with pytest.raises(BenchmarkError, match="smaller batch size"):
            benchmark({"a": conv}, settings)

    def test_output_too_large_for_memory(self, tmp_path: Path) -> None:
        # More than any address space, so that no system pretends to grant it.
        file = save_expand(tmp_path / "large.onnx", elements=2**55)
        with pytest.raises(BenchmarkError, match=r"large\.onnx.*smaller batch size") as caught:
            benchmark({"a": file}, SHORT)
        assert "\n" not in str(caught.value)


class TestProcesses:
    def test_killed_worker(self, conv: Path) -> None:
        def kill(done: int, turns: int) -> None:
            (worker,) = own_workers()
            os.kill(worker.pid, signal.SIGKILL)

        with pytest.raises(BenchmarkError, match=r"'a' .*conv\.onnx.*SIGKILL.*smaller batch"):
            benchmark({"a": conv}, SHORT, progress=kill)

    def test_each_model_has_a_process_while_the_benchmark_runs(self, conv: Path) -> None:
        counts: set[int] = set()
        benchmark(
            {"a": conv, "b": conv},
            SHORT,
            progress=lambda done, turns: counts.add(len(own_workers())),
        )
        assert counts == {2}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_none_is_left_after_an_exception(self, conv: Path, error: type[BaseException]) -> None:
        def fail(done: int, turns: int) -> None:
            assert len(own_workers()) == 2
            raise error

        with pytest.raises(error):
            benchmark({"a": conv, "b": conv}, SHORT, progress=fail)
        assert own_workers() == []

    @pytest.mark.parametrize("when", ["starting", "measuring"])
    def test_control_c_leaves_no_worker_and_prints_none_of_their_tracebacks(
        self, conv: Path, when: str
    ) -> None:
        with started_benchmark(conv) as parent:
            workers = workers_of(parent)
            if when == "measuring":
                assert parent.stdout is not None
                assert parent.stdout.readline() == "turn\n"
            os.killpg(parent.pid, signal.SIGINT)
            _, messages = parent.communicate(timeout=20)
        assert parent.returncode == -signal.SIGINT
        assert messages.count("Traceback") == 1
        assert "benchmark_worker.py" not in messages
        assert all_end(workers)

    def test_workers_end_when_their_parent_is_killed(self, conv: Path) -> None:
        with started_benchmark(conv) as parent:
            workers = workers_of(parent)
            parent.kill()
            parent.wait()
        assert all_end(workers)


def started_benchmark(file: Path) -> subprocess.Popen[str]:
    """A process, leader of its own group, in a benchmark of two models that lasts minutes."""
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from structconv_cli.timing.benchmark import BenchmarkSettings, benchmark

        file = Path({str(file)!r})
        settings = BenchmarkSettings(rounds=10**5, round_ms=1, warmup_ms=1)
        benchmark(
            {{"a": file, "b": file}}, settings, progress=lambda *_: print("turn", flush=True)
        )
        """
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def workers_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        workers: list[psutil.Process] = psutil.Process(parent.pid).children()
        if len(workers) == 2:
            return workers
        time.sleep(0.01)
    raise AssertionError("the benchmark started no workers")


def all_end(workers: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(workers, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
