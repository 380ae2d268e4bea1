"""Which of many architectures convert from a bare state_dict, and whether they are recognised.

Each architecture of torchvision, timm and the sample models gets random weights, which are saved
as a plain state_dict. In a process of its own the file is recognised, converted without training
(n = 2 and half of the input channels, where layers allow), exported, and verified in ONNX Runtime:

    python benchmarks/any_checkpoint.py --out docs/architectures.md
    python benchmarks/any_checkpoint.py --only torchvision:resnet18 timm:dla34

Needs torchvision and timm (see `architectures.py`). What `--results` holds is not run again. Where
several architectures fit that compute different things, structconv asks; the right one is then
named with --arch, and the table says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

LIMIT_S = 1800
SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
# Side of the images (pixels) by architecture: small ones, to be quick.
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 64, "deeplabv3_mobilenet_v3_large": 64,
    "deeplabv3_resnet50": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "fcn_resnet50": 64, "googlenet": 64, "inception_v3": 96, "lraspp_mobilenet_v3_large": 64,
    "mnasnet0_5": 64, "mnasnet1_0": 64, "mobilenet_v2": 64, "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64,
    "resnet34": 64, "resnet50": 64, "resnext50_32x4d": 64, "shufflenet_v2_x1_0": 64,
    "squeezenet1_0": 64, "squeezenet1_1": 64, "vgg11": 64, "vgg11_bn": 64, "wide_resnet50_2": 64,
}  # fmt: skip
TIMM = {
    "cspdarknet53": 64, "cspresnet50": 64, "dla34": 64, "dpn68": 64, "ecaresnet26t": 64,
    "efficientnet_b0": 64, "efficientnet_lite0": 64, "ese_vovnet19b_dw": 64, "fbnetc_100": 64,
    "gernet_s": 64, "ghostnet_100": 64, "hardcorenas_a": 64, "hgnetv2_b0": 64,
    "hrnet_w18_small": 64, "lcnet_050": 64, "legacy_xception": 96, "mixnet_s": 64,
    "mobilenetv3_large_100": 64, "mobilenetv4_conv_small": 64, "mobileone_s0": 64,
    "nf_regnet_b0": 64, "nf_resnet26": 64, "regnetx_002": 64, "regnety_002": 64,
    "repghostnet_050": 64, "repvgg_a0": 64, "res2net50_26w_4s": 64, "resnest14d": 64,
    "resnet10t": 64, "resnet26d": 64, "resnetv2_50": 64, "resnetv2_50x1_bit": 64, "rexnet_100": 64,
    "selecsls42b": 64, "semnasnet_075": 64, "seresnet18": 64, "skresnet18": 64, "spnasnet_100": 64,
    "starnet_s1": 64, "tf_efficientnet_b0": 64, "tf_efficientnetv2_b0": 64, "tinynet_e": 64,
    "vovnet39a": 64, "xception41": 96,
}  # fmt: skip
OWN = {"resnet_cifar.py:resnet20": 32, "unet.py:unet": 64}
HEAD = (
    "| architecture | recognised as | in s | structured | kept | exact | all in s |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        reference: its name.
        size: side of the images (pixels).
        recognised: what it was recognised as; those that were asked about.
        right: whether the right one is among them.
        asked: whether it had to be named, as several fit that compute different things.
        same: how many more compute the same.
        recognition_s: processor seconds that recognising took, from the cached index.
        structured: layers that were structured.
        kept: layers that were kept, each with its reason.
        exact: whether conversion and `verify` found the rewrite exact.
        seconds: processor seconds of all of it.
        reason: what stopped it.
    """

    reference: str
    size: int
    recognised: list[str] = field(default_factory=list)
    right: bool = False
    asked: bool = False
    same: int = 0
    recognition_s: float = 0.0
    structured: int = 0
    kept: int = 0
    exact: bool = False
    seconds: float = 0.0
    reason: str = ""

    def row(self) -> str:
        """A Markdown table row."""
        named = ", ".join(Path(one).name for one in self.recognised) or "—"
        if self.asked:
            named = f"asks: {named}"
        if self.same:
            named += f" (+{self.same} equal)"
        exact = "yes" if self.exact else f"**no**: {self.reason}"
        name = Path(self.reference).name
        return (
            f"| {name}, {self.size} px | {named} | {self.recognition_s:.1f} | "
            f"{self.structured or '—'} | {self.kept or '—'} | {exact} | {self.seconds:.0f} |"
        )


def catalogue() -> dict[str, int]:
    """All architectures of the table, and the sides of their images (pixels)."""
    own = {f"{SAMPLES / name}": size for name, size in OWN.items()}
    torchvision = {f"torchvision:{name}": size for name, size in TORCHVISION.items()}
    return torchvision | {f"timm:{name}": size for name, size in TIMM.items()} | own


def convert_one(reference: str, size: int, folder: Path, *, name_it: bool) -> Outcome:
    """Save one architecture's random weights, and recognise, convert and verify the file.

    Args:
        reference: the architecture.
        size: side of its images (pixels).
        folder: where files go.
        name_it: give `convert` what was recognised, in place of letting it do so again.
    """
    import torch
    from architectures import lively
    from typer.testing import CliRunner

    from structconv_cli.cli import app
    from structconv_cli.errors import StructconvError
    from structconv_cli.model.architecture import Architecture
    from structconv_cli.plan import read_plan

    start = time.process_time()
    outcome = Outcome(reference, size)
    file, run = folder / "weights.pt", folder / "run"
    torch.save(lively(Architecture(reference), 3, size).state_dict(), file)
    command = ["convert", str(file), "--no-finetune", "--n", "2", "--channels", "0.5"]
    command += ["--input-shape", f"1x3x{size}x{size}", "--forms", "split+average"]
    command += ["--out", str(run)]
    try:
        chosen = recognition(file, outcome)
    except StructconvError as error:
        outcome.reason = str(error)
        return outcome
    if name_it or outcome.asked:
        command += ["--arch", chosen.reference]
        for key, value in chosen.arguments.items():
            command += ["--arch-arg", f"{key}={value}"]
    for arguments in (command, ["verify", str(run)]):
        result = CliRunner().invoke(app, arguments)
        if result.exit_code:
            outcome.reason = " ".join(result.output.split())[-600:]
            if result.exception and not isinstance(result.exception, SystemExit):
                outcome.reason += f" {result.exception!r}"
            break
    else:
        outcome.exact = True
    if (run / "plan.json").is_file():
        plan = read_plan(run / "plan.json")
        outcome.structured = len(plan.structures)
        outcome.kept = len(plan.layers) - outcome.structured
    outcome.seconds = time.process_time() - start
    return outcome


def recognition(file: Path, outcome: Outcome):
    """Recognise a file, and note how well; what to convert it with."""
    from structconv_cli.errors import ArchitectureError
    from structconv_cli.model.architecture import Architecture
    from structconv_cli.model.checkpoint import load_checkpoint
    from structconv_cli.model.recognition.recognise import AmbiguousArchitectureError, recognise

    tensors = load_checkpoint(file).tensors
    start = time.process_time()
    try:
        found = recognise(tensors)
    except AmbiguousArchitectureError as several:
        outcome.asked = True
        outcome.recognised = [str(group[0]) for group in several.classes]
        members = [one for group in several.classes for one in group]
        chosen = next((one for one in members if one.reference == outcome.reference), None)
        outcome.right = chosen is not None
        if chosen is None:
            raise ArchitectureError(f"asked about others: {outcome.recognised}") from None
        # Of several settings the one that was saved.
        chosen = Architecture(outcome.reference)
    else:
        outcome.recognised = [str(found.architecture)]
        outcome.same = len(found.alternatives)
        every = (found.architecture, *found.alternatives)
        outcome.right = any(one.reference == outcome.reference for one in every)
        chosen = found.architecture
    outcome.recognition_s = time.process_time() - start
    return chosen


def in_own_process(reference: str, size: int, *, name_it: bool) -> Outcome:
    """One architecture in a process of its own, with a limit on its time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", reference, str(size), folder]
        command += ["--name-it"] * name_it
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Outcome(reference, size, reason=f"not done after {LIMIT_S} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = " ".join(done.stderr.split())[-400:]
        return Outcome(reference, size, reason=f"exit status {done.returncode}: {said}")
    return Outcome(**json.loads(lines[-1]))


def page(outcomes: list[Outcome]) -> str:
    """The table, with what it shows in a sentence each."""
    from importlib.metadata import version

    count = len(outcomes)
    exact = sum(outcome.exact for outcome in outcomes)
    asked = sum(outcome.asked for outcome in outcomes)
    right = sum(outcome.right for outcome in outcomes)
    slowest = max(outcome.recognition_s for outcome in outcomes)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "onnxruntime")
    )
    rows = "\n".join(outcome.row() for outcome in outcomes)
    return (
        f"# Architectures\n\n"
        f"{count} architectures with random weights, saved as plain state_dicts and converted with "
        f"`--no-finetune --n 2 --channels 0.5`, each in its own process ({versions}).\n\n"
        f"- {exact} of {count} were converted, exported and verified in ONNX Runtime.\n"
        f"- {right} of {count} were recognised without `--arch`: {right - asked} as the one "
        f"architecture or class of equal ones, {asked} as one of several that have the same "
        f"tensors and compute different things, which structconv asks about.\n"
        f"- Recognising took {slowest:.1f} s at most, from the cached index.\n\n"
        f"Seconds are those of one processor core.\n\n"
        f"Made by `python benchmarks/any_checkpoint.py --out docs/architectures.md`.\n\n"
        f"{HEAD}\n{rows}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="these architectures")
    parser.add_argument("--results", type=Path, help="JSON lines: what is there is not run again")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--name-it", action="store_true", help="give convert what was recognised")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        reference, size, folder = options.child
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        outcome = convert_one(reference, int(size), Path(folder), name_it=options.name_it)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.close()
        return
    wanted = catalogue()
    if options.only:
        wanted = {name: wanted.get(name, 64) for name in options.only}
    known: dict[str, Outcome] = {}
    if options.results and options.results.is_file():
        for line in options.results.read_text().splitlines():
            outcome = Outcome(**json.loads(line))
            known[outcome.reference] = outcome
    missing = [name for name in wanted if name not in known]

    def run(name: str) -> Outcome:
        outcome = in_own_process(name, wanted[name], name_it=options.name_it)
        print(outcome.row(), flush=True)
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        return outcome

    with ThreadPoolExecutor(options.jobs) as pool:
        known |= {outcome.reference: outcome for outcome in pool.map(run, missing)}
    if options.out:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(page([known[name] for name in wanted]))


if __name__ == "__main__":
    main()
