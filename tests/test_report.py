"""The HTML report: its figures are those of the files, and a browser shows it as it should."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from example_benchmark import example_benchmark
from typer.testing import CliRunner

from structconv_cli.cli import app
from structconv_cli.exactness import Check
from structconv_cli.html.figures import FORMATS, figure
from structconv_cli.html.page import render_page, write_report
from structconv_cli.html.results import RunResults, read_results
from structconv_cli.json_file import write_json
from structconv_cli.tasks.task import Metric

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
EVIL = '<script>document.title="owned"</script><img src=x onerror=alert(1)>"\'&$x_1$'
WIDTHS = (360, 768, 1280)


@pytest.fixture(scope="module")
def planned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was planned for a target, tuned, and benchmarked with a rival and layers."""
    out = tmp_path_factory.mktemp("report") / "planned run"
    words = ["convert", str(tiny / "tiny.pt"), "--arch", f"{tiny / 'tiny.py'}:tiny", "--data"]
    words += [str(tiny / "data.npz"), "--val-split", "0.2", "--epochs", "3", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--target-macs", "0.8", "--forms", "split+average"])
    assert done.exit_code == 0, done.output
    write_json(example_benchmark(out), out / "benchmark.json")
    return out


@pytest.fixture(scope="module")
def unjudged(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file converted without data: no accuracy, no prediction, no benchmark."""
    out = tmp_path_factory.mktemp("report") / "unjudged"
    words = ["convert", str(planned / "original.onnx"), "--forms", "split+average"]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def results(planned: Path) -> RunResults:
    return read_results(planned)


@pytest.fixture(scope="module")
def planned_text(results: RunResults) -> str:
    return render_page(results)


class Page(HTMLParser):
    """What tests ask of a page: its figures, its text, its elements and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[dict[str, str | None], str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._data: dict[str, str | None] | None = None
        self._words = ""
        self._silent = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "data":
            self._data, self._words = dict(attrs), ""
        if tag == "style":
            self._silent = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "data" and self._data is not None:
            self.figures.append((self._data, self._words))
            self._data = None
        if tag == self._silent:
            self._silent = ""

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data
        self._words += data


def found_at(folder: Path, place: str) -> Any:
    """What a file holds at a JSON pointer."""
    name, pointer = place.split("#")
    value = json.loads((folder / name).read_bytes())
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def number(shown: str) -> tuple[float, float] | None:
    """A shown number in its file's unit, and half of its last digit; None where it is a bound."""
    words = shown.replace("\u2212", "-").replace("\u202f", " ").strip()
    if words.startswith("<"):
        return None
    power = re.fullmatch(r"([\d.]+) × 10(-?\d+)", words)
    if power:
        return float(power[1]) * 10.0 ** int(power[2]), 0.05 * 10.0 ** int(power[2])
    match = re.fullmatch(r"([+-]?[\d ]*\.?\d+) ?(KiB|MiB|GMAC/s|[kMG]|ms|s|%)?", words)
    assert match is not None, shown
    scale = {"KiB": 2**10, "MiB": 2**20, "k": 1e3, "M": 1e6, "G": 1e9, "GMAC/s": 1e9}
    factor = scale.get(match[2] or "", 1)
    decimals = len(match[1].partition(".")[2])
    return float(match[1].replace(" ", "")) * factor, 0.5 * 10.0**-decimals * factor


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["planned", "unjudged"])
def test_figures_are_those_of_the_files(
    kind: str, request: pytest.FixtureRequest, planned_text: str
) -> None:
    run: Path = request.getfixturevalue(kind)
    page = Page(planned_text) if kind == "planned" else page_of(run)
    cited = [(data, shown) for data, shown in page.figures if "data-from" in data]
    assert len(cited) > (150 if kind == "planned" else 20)
    for data, shown in cited:
        exact = json.loads(data["value"] or "")
        assert exact == found_at(run, data["data-from"] or ""), data
        read = number(shown)
        if read is not None:
            value, half = read
            # A share of 0.95 is shown as 95 %.
            apart = min(abs(value - exact), abs(value - 100 * exact))
            assert apart <= half * (1 + 1e-9), (data, shown)


def test_every_part_of_the_files_is_shown(planned: Path, planned_text: str) -> None:
    page = Page(planned_text)
    cited = {data.get("data-from") for data, _ in page.figures}
    benchmark = json.loads((planned / "benchmark.json").read_bytes())
    convert = json.loads((planned / "convert.json").read_bytes())
    for i, setting in enumerate(benchmark["settings"]):
        for j, _ in enumerate(setting["models"]):
            for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "throughput"):
                assert f"benchmark.json#/settings/{i}/models/{j}/{key}" in cited
        for j, _ in enumerate(setting["speedups"]):
            assert f"benchmark.json#/settings/{i}/speedups/{j}/median" in cited
    for i, _ in enumerate(convert["finetune"]["stages"]):
        assert f"convert.json#/finetune/stages/{i}/evaluation/score" in cited
    for i, layer in enumerate(convert["layers"]):
        assert f"convert.json#/layers/{i}/before/multiplications" in cited
        assert layer["name"] in page.text
        assert layer["note"] in page.text
    for i, _ in enumerate(json.loads((planned / "prediction.json").read_bytes())["curve"]):
        assert f"prediction.json#/curve/{i}/loss" in cited
    for model in benchmark["models"]:
        assert model["made"] in page.text
    for warning in benchmark["settings"][0]["warnings"]:
        assert warning in page.text
    assert benchmark["environment"]["cpu"] in page.text


def heading(page: str) -> str:
    match = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    assert match is not None
    return " ".join(Page(match[1]).text.replace("\u202f", " ").split())


def with_speedup(results: RunResults, **changes: Any) -> RunResults:
    assert results.benchmark is not None
    first, *others = results.benchmark.settings
    mine, *rivals = first.speedups
    setting = replace(first, speedups=(replace(mine, **changes), *rivals))
    return replace(results, benchmark=replace(results.benchmark, settings=(setting, *others)))


def with_scores(results: RunResults, before: float, after: float, metric: Metric) -> RunResults:
    tuning = results.convert.finetune
    stages = tuple(
        replace(stage, evaluation=replace(stage.evaluation, score=score))
        for stage, score in zip((tuning.stages[0], tuning.stages[-1]), (before, after), strict=True)
    )
    changed = replace(tuning, stages=stages, metric=metric)
    return replace(results, convert=replace(results.convert, finetune=changed))


ACCURACY = Metric("top-1 accuracy", "%")


def test_the_verdict_is_one_sentence(results: RunResults) -> None:
    run = with_scores(results, 99.781, 99.332, ACCURACY)
    assert heading(render_page(with_speedup(run, median=1.8149, verdict="faster"))) == (
        "The structured model is 1.81 times as fast as the original; its top-1 accuracy goes from "
        "99.78 % to 99.33 %; the rewrite is exact."
    )
    for verdict, words in (
        ("slower", "is slower than the original, 0.80 times as fast"),
        ("no significant difference", "is not significantly faster or slower"),
        ("too few rounds", "was timed in too few rounds for a verdict"),
    ):
        changed = with_speedup(run, median=0.8, low=None, high=None, verdict=verdict)
        assert words in heading(render_page(changed))
    lead = Page(re.findall(r'<p class="lead">(.*?)</p>', render_page(run), re.DOTALL)[0]).text
    assert results.benchmark is not None
    other = results.benchmark.settings[1].speedups[0]
    assert f"2 threads, batch 8: {other.median:.2f}." in lead
    level = with_scores(results, 58.514, 58.511, Metric("mIoU", "%"))
    assert "its mIoU is unchanged at 58.51 %" in heading(render_page(level))


def test_metrics_keep_their_units_and_direction(results: RunResults) -> None:
    worse = with_scores(results, 31.25, 30.5, Metric("PSNR", "dB"))
    page = render_page(worse)
    assert "its PSNR goes from 31.25 dB to 30.50 dB" in heading(page)
    assert "\u22120.75" in page
    assert "dB</small>" in page
    error = with_scores(results, 0.5, 0.25, Metric("error", "", higher_is_better=False))
    assert "its error goes from 0.50 to 0.25" in heading(render_page(error))
    assert "Lower is better." in render_page(error)


def test_what_is_not_exact_is_said_first(results: RunResults) -> None:
    failed = Check("conv", "ONNX kernel", 0.5, 1e-7, False, f"off by 0.5 {EVIL}")
    verify = replace(
        results.verify,
        exact=False,
        first_diverging="conv",
        layers=(*results.verify.layers, failed),
    )
    page = render_page(replace(results, verify=verify))
    assert heading(page).endswith("The rewrite is not exact: do not use this model.")
    text = Page(page).text
    assert f"off by 0.5 {EVIL}" in text
    assert "1 failed" in text


def test_what_is_missing_is_named_with_its_remedy(unjudged: Path, tmp_path: Path) -> None:
    text = page_of(unjudged).text
    assert f"Run structconv benchmark {unjudged}" in " ".join(text.split())
    assert "what it costs in accuracy is unmeasured" in text
    assert "No prediction." in text
    assert "--per-layer" in text
    damaged = tmp_path / "damaged"
    shutil.copytree(unjudged, damaged)
    (damaged / "benchmark.json").write_text('{"settings": 1')
    assert "benchmark.json cannot be read" in page_of(damaged).text


def test_an_interrupted_benchmark_is_shown_as_partial(planned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(planned, run)
    (run / "benchmark.json").unlink()
    write_json(replace(example_benchmark(run), partial=True), run / "benchmark.partial.json")
    page = page_of(run)
    assert "these figures are partial" in page.text
    assert any("benchmark.partial.json#" in (x.get("data-from") or "") for x, _ in page.figures)


def test_text_from_files_is_inert(results: RunResults) -> None:
    assert results.benchmark is not None
    assert results.prediction is not None
    layers = tuple(replace(x, name=EVIL, note=EVIL) for x in results.convert.layers)
    models = tuple(replace(x, made=EVIL) for x in results.benchmark.models)
    evil = replace(
        with_scores(results, 1, 2, Metric(EVIL, EVIL)),
        info=replace(results.info, checkpoint=EVIL, command=(EVIL,), task=EVIL),
        inventory=replace(
            results.inventory, inputs={EVIL: next(iter(results.inventory.inputs.values()))}
        ),
        benchmark=replace(results.benchmark, models=models, failures=(EVIL,)),
        prediction=replace(results.prediction, loss_is=EVIL, environment=EVIL, notes=(EVIL,)),
    )
    evil = replace(evil, convert=replace(evil.convert, layers=layers, notes=(EVIL,)))
    page = Page(render_page(evil))
    assert page.text.count(EVIL) > 8
    assert not [tag for tag, _ in page.elements if tag in ("script", "img", "iframe", "object")]
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]


def test_nothing_is_fetched(planned_text: str) -> None:
    text = planned_text
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), attributes
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert len(text) < 500_000
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_three_lines_run(
    planned: Path, planned_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = re.search(r'<pre><code class="python">(.*?)</code>', planned_text, re.DOTALL)
    assert match is not None
    lines = Page(match[1]).text
    assert len(lines.splitlines()) == 3
    monkeypatch.chdir(planned)
    import numpy as np

    space: dict[str, Any] = {"batch": np.zeros((2, 1, 8, 8), np.float32)}
    exec(lines, space)
    assert space["outputs"][0].shape == (2, 3)
    assert isinstance(space["session"], onnxruntime.InferenceSession)


def test_the_command_writes_where_it_is_told(planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "somewhere.html"
    done = CliRunner().invoke(app, ["report", str(planned), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    (planned / "report.html").unlink(missing_ok=True)
    assert CliRunner().invoke(app, ["report", str(planned)]).exit_code == 0
    assert (planned / "report.html").is_file()
    assert not list(planned.glob("*.part"))


@pytest.mark.parametrize(
    "wrong", ["missing", "file", "no run", "incomplete", "folder", "no parent"]
)
def test_what_cannot_be_reported_is_refused(wrong: str, planned: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "old.html"
    out.write_text("old")
    if wrong == "file":
        run.write_text("")
    elif wrong == "no run":
        run.mkdir()
    elif wrong != "missing":
        shutil.copytree(planned, run)
    if wrong == "incomplete":
        (run / "convert.json").write_text('{"layers": 3}')
    if wrong == "folder":
        out = tmp_path
    if wrong == "no parent":
        out = tmp_path / "nowhere" / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(out)])
    assert done.exit_code == 1
    assert "Error:" in done.output
    assert "Traceback" not in done.output
    assert (tmp_path / "old.html").read_text() == "old"


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (5.8173, "ms", "5.82 ms"),
        (1234.5, "ms", "1 234 ms"),
        (0.04217, "ms", "0.0422 ms"),
        (0.0, "ms", "0 ms"),
        (1085078, "bytes", "1.03 MiB"),
        (40300000, "big", "40.3 M"),
        (-0.444, "change", "\u22120.44"),
        (1.2e-7, "power", "1.2 × 10<sup>\u22127</sup>"),
        (0.00001, "significant", "1.0 × 10<sup>\u22125</sup>"),
        (0.95, "whole percent", "95 %"),
        (0.01, "seconds", "< 0.1 s"),
        (float("inf"), "ms", "not finite ms"),
    ],
)
def test_formats(value: float, kind: str, shown: str) -> None:
    assert str(FORMATS[kind](value)).replace("\u202f", " ") == shown


def test_a_figure_names_its_place() -> None:
    text = str(figure(1.5, "ratio", ["a.json", "x/y", 0, "<z>"]))
    assert text == '<data value="1.5" data-from="a.json#/x~1y/0/&lt;z&gt;">1.50</data>'
    assert "–" in str(figure(None, "ratio"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not Path(CHROMIUM).is_file() or not Path(DRIVER).is_file():
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    words = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    words += " disable-background-networking disable-component-update"
    for word in words.split():
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(
    planned_text: str,
    unjudged: Path,
    results: RunResults,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    long = "features.denselayer_with_a_long_name/block.17.squeeze_and_excitation.conv" * 2
    layers = tuple(replace(x, name=f"{long}{i}") for i, x in enumerate(results.convert.layers * 8))
    many = replace(results, convert=replace(results.convert, layers=layers))
    evil = with_scores(results, 1, 2, Metric(EVIL, "%"))
    texts: dict[str, Callable[[], str]] = {
        "planned": lambda: planned_text,
        "unjudged": lambda: render_page(read_results(unjudged)),
        "many": lambda: render_page(many),
        "evil": lambda: render_page(evil),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


@pytest.mark.parametrize("name", ["planned", "unjudged", "many", "evil"])
def test_a_browser_shows_it_without_errors_requests_or_overflow(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    for width in WIDTHS:
        show(browser, pages[name], width, "light")
        browser.execute_script(
            "for (const x of document.querySelectorAll('details')) x.open = true"
        )
        wide, room = browser.execute_script(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert wide <= room, f"{name} is {wide} px wide at {width}"
        # What is wider scrolls in a box of its own, which the keyboard reaches.
        assert browser.execute_script(
            "return [...document.querySelectorAll('.scroll')].every(x => x.tabIndex === 0"
            " && x.getBoundingClientRect().right <= innerWidth + 1)"
        )
        plots = browser.execute_script(
            "return [...document.querySelectorAll('.plot svg')]"
            ".filter(x => x.getBoundingClientRect().width > 0)"
            ".map(x => x.closest('.plot').className)"
        )
        expected = "plot narrow" if width < 500 else "plot wide"
        assert set(plots) <= {expected}
        assert bool(plots) == (name != "unjudged")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    # The browser's own pages ask for theirs.
    asked = {
        x["params"]["request"]["url"]
        for x in messages
        if x["method"] == "Network.requestWillBeSent"
        and not x["params"]["documentURL"].startswith(("chrome:", "data:"))
    }
    assert asked <= {pages[name].as_uri(), "data:,"}
    assert pages[name].as_uri() in asked
    assert browser.title != "owned"


def test_the_browsers_figures_are_the_files(
    browser: Any, pages: dict[str, Path], planned: Path
) -> None:
    show(browser, pages["planned"], 1280, "light")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('data[data-from]')]"
        ".map(x => [x.value, x.dataset.from])"
    )
    assert len(shown) > 150
    for value, place in shown:
        assert json.loads(value) == found_at(planned, place)
    bars = browser.execute_script(
        "return [...document.querySelectorAll('#layers .pair')].map(x =>"
        " [x.querySelector('.bar').getBoundingClientRect().width,"
        " +x.querySelector('data').value, x.closest('td').cellIndex])"
    )
    for column in {index for _, _, index in bars}:
        scales = [width / value for width, value, index in bars if index == column and width > 8]
        assert max(scales) / min(scales) < 1.05


def contrasts(browser: Any) -> list[float]:
    """Contrast of every element's own text against the page or the box behind it (WCAG 2)."""
    found: list[float] = browser.execute_script(
        """
        const rgb = s => s.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92
            : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
        const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        return [...document.querySelectorAll('body *')].filter(own)
            .filter(e => e.getClientRects().length).map(e => {
            const style = getComputedStyle(e);
            const a = light(rgb(e.closest('svg') ? style.fill : style.color).slice(0, 3));
            const b = light(behind(e));
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
        """
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(
    browser: Any, pages: dict[str, Path], scheme: str
) -> None:
    show(browser, pages["planned"], 1280, scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    found = contrasts(browser)
    assert len(found) > 200
    assert min(found) >= 4.5


def test_paper_is_white_and_whole(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["many"], 1280, "dark")
    printed = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", printed)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    # Folded tables are printed too.
    assert browser.execute_script(
        "return [...document.querySelectorAll('details:not([open]) td')]"
        ".every(x => x.checkVisibility())"
    )
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length")
    file = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(file["data"]).startswith(b"%PDF")


def test_the_page_can_be_read_aloud(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["planned"], 1280, "light")
    assert browser.execute_script(
        """
        const all = s => [...document.querySelectorAll(s)];
        return all('table').every(t => t.caption && t.tHead
                && [...t.tHead.rows[0].cells].every(c => c.scope === 'col'))
            && all('svg').every(s => s.getAttribute('role') === 'img'
                && s.getAttribute('aria-label').length > 20)
            && all('h1').length === 1 && document.documentElement.lang === 'en'
            && all('nav a').every(a => document.querySelector(a.getAttribute('href')));
        """
    )
