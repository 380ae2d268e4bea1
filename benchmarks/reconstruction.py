"""Accuracy against share of MACs without training, from a few hundred unlabelled images.

    python benchmarks/reconstruction.py resnet20_cifar10_jpeg.pt --data cifar10_jpeg --work recon
    python benchmarks/reconstruction.py planbench/resnet56/original.pt --data cifar10_jpeg \
        --work recon --network resnet56

A CIFAR-10 ResNet (`sample_models/resnet_cifar.py`), structured as `structconv plan` would for each
share of its MACs (--shares; the plans are kept in WORK/NETWORK, made from the first draw of images,
without labels), and uniformly: every 3x3 convolution but the stem to 2x3 or 2x2. For each, the
top-1 accuracy on test images after

- projection: the nearest weights, batch norm re-estimated on the images;
- independent: each layer by least squares, all others as they are (`least_squares`), as the planner
  predicts it; with and without re-estimation;
- sequential: each layer on what the changed ones before it make; with sums; with dense layers
  refitted too; both (the default of `reconstruct`); with re-estimation.

Every draw (--draws) takes other training images. ResNet-56's published checkpoint was trained on
other files: `benchmarks/planning.py original` adapts it, and writes `original.pt`. Findings:
`benchmarks/README.md`, "Without training".
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm
from structconv_cli.data.dataset import load_dataset
from structconv_cli.data.spec import DataSpec
from structconv_cli.json_file import write_json
from structconv_cli.model.checkpoint import load_checkpoint
from structconv_cli.model.signature import INPUT
from structconv_cli.onnx.export import export_onnx
from structconv_cli.onnx.probe import dense_kernel, layer_nodes, run_fed, session
from structconv_cli.plan import read_plan
from structconv_cli.planning.proposal import Planner
from structconv_cli.planning.settings import ProposalSettings
from structconv_cli.planning.targets import Targets
from structconv_cli.reconstruction.activations import second_moments
from structconv_cli.reconstruction.apply import apply_to_graph, apply_to_module
from structconv_cli.reconstruction.least_squares import DenseLayer
from structconv_cli.reconstruction.result import (
    NewWeight,
    Reconstruction,
    ReconstructionRecord,
    ReconstructionSettings,
)
from structconv_cli.reconstruction.samples import Samples
from structconv_cli.reconstruction.sequential import reconstruct
from structconv_cli.structure import Structure

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT.parent / "shared" / "checkpoints"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNIFORM = {"2x3": (2, 3), "2x2": (2, 2)}

Floats = npt.NDArray[np.float32]
Plan = Mapping[str, Structure]


class Study:
    """A network, its images, and what is done to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work / options.network
        self.folder.mkdir(parents=True, exist_ok=True)
        self.graph = export_onnx(self.model(), torch.zeros(2, 3, 32, 32))
        self.drawn, self.tests, self.truth = self._images()

    def model(self) -> nn.Module:
        sys.path.insert(0, str(ROOT))
        from sample_models import resnet_cifar

        model: nn.Module = getattr(resnet_cifar, self.options.network)()
        path = Path(self.options.checkpoint)
        tensors = load_checkpoint(path if path.exists() else CHECKPOINTS / path).tensors
        # `planning.py` writes shortcuts as convolutions of fixed weights.
        model.load_state_dict({n: t for n, t in tensors.items() if ".shortcut." not in n})
        return model.eval()

    def _images(self) -> tuple[list[Floats], Floats, npt.NDArray[np.int64]]:
        """Training images for every draw, and evenly chosen test images with labels."""
        file = self.options.work / "images.npz"
        if not file.exists():
            spec = DataSpec(str(self.options.data), mean=MEAN, std=STD)
            data = load_dataset(spec, channels=3)
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
            train, _ = data.train.fetch(order[:6000])
            test, labels = data.val.fetch(torch.arange(len(data.val)))
            assert labels is not None
            np.savez(
                file,
                train=data.prepare(train).numpy(),
                test=data.prepare(test).numpy(),
                test_y=labels.numpy(),
            )
        kept, count = np.load(file), self.options.images
        drawn = [kept["train"][count * i : count * (i + 1)] for i in range(self.options.draws)]
        step = max(1, len(kept["test"]) // self.options.test_images)
        return drawn, kept["test"][::step], kept["test_y"][::step].astype(np.int64)

    def accuracy(self, graph: onnx.ModelProto) -> float:
        """Percent of the test images."""
        runtime, right = session(graph, 1), 0
        for start in range(0, len(self.tests), 50):
            part = slice(start, start + 50)
            scores = run_fed(runtime, {INPUT: self.tests[part]})[0]
            right += int((scores.argmax(1) == self.truth[part]).sum())
        return 100 * right / len(self.tests)

    def plans(self) -> dict[str, Plan]:
        """Structures by name: planned for shares of the MACs, and uniform."""
        found: dict[str, Plan] = {}
        files = {share: self.folder / f"{share}.json" for share in self.options.shares}
        if not all(file.exists() for file in files.values()):
            samples = Samples({INPUT: self.drawn[0]})
            settings = ProposalSettings(timings=self.options.work / "timings.json", tuned=False)
            planner = Planner(self.graph, {INPUT: self.drawn[0][:1]}, samples, settings)
            for share, file in files.items():
                write_json(planner.propose(Targets(macs=share)).plan, file)
        for share, file in files.items():
            found[str(share)] = read_plan(file).structures
        for name in self.options.uniform:
            found[name] = {
                layer: Structure((module.in_channels, 3, 3), (module.in_channels, *UNIFORM[name]))
                for layer, module in list(self.model().named_modules())[2:]
                if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
            }
        return found

    def reestimated(self, found: Reconstruction, images: Floats) -> onnx.ModelProto:
        """Through the PyTorch model, its batch norms re-estimated."""
        model = self.model()
        apply_to_module(model, self.graph, found)
        reestimate_batch_norm(model, torch.from_numpy(images).split(250))
        return export_onnx(model, torch.zeros(2, 3, 32, 32))

    def independent(self, plan: Plan, images: Floats) -> Reconstruction:
        weights = {}
        moments = second_moments(self.graph, plan, {INPUT: images})
        for name, structure in plan.items():
            node = layer_nodes(self.graph, [name])[name][0]
            weight, bias = (torch.from_numpy(np.copy(a)) for a in dense_kernel(self.graph, node))
            fit = DenseLayer(weight, bias, moments[name]).fit(structure)
            weights[name] = NewWeight(fit.weight, fit.bias - bias.double(), structure)
        return Reconstruction(weights, ReconstructionRecord((), len(images)))

    def sequential(self, plan: Plan, images: Floats, **how: bool) -> Reconstruction:
        samples = Samples({INPUT: images})
        return reconstruct(self.graph, plan, samples, ReconstructionSettings(**how))  # type: ignore[arg-type]

    def methods(self) -> dict[str, Callable[[Plan, Floats], onnx.ModelProto]]:
        def kept(found: Reconstruction) -> onnx.ModelProto:
            return apply_to_graph(self.graph, found)

        return {
            "projection, BN": lambda p, x: self.reestimated(reconstruct(self.graph, p, None), x),
            "independent, BN": lambda p, x: self.reestimated(self.independent(p, x), x),
            "independent": lambda p, x: kept(self.independent(p, x)),
            "sequential": lambda p, x: kept(self.sequential(p, x, refit=False, sums=False)),
            "rescaled": lambda p, x: kept(
                self.sequential(p, x, refit=False, sums=False, rescale=True)
            ),
            "sums": lambda p, x: kept(self.sequential(p, x, refit=False)),
            "refit": lambda p, x: kept(self.sequential(p, x, sums=False)),
            "sums, refit": lambda p, x: kept(self.sequential(p, x)),
            "sums, refit, BN": lambda p, x: self.reestimated(self.sequential(p, x), x),
        }

    def run(self) -> None:
        print(f"{self.options.network}: {self.accuracy(self.graph):.2f} %", flush=True)
        model = self.model()
        reestimate_batch_norm(model, torch.from_numpy(self.drawn[0]).split(250))
        same = self.accuracy(export_onnx(model, torch.zeros(2, 3, 32, 32)))
        print(f"its batch norm re-estimated: {same:.2f} %", flush=True)
        methods = self.methods()
        for name, plan in self.plans().items():
            for method in self.options.methods or methods:
                start = time.perf_counter()
                found = [self.accuracy(methods[method](plan, images)) for images in self.drawn]
                seconds = (time.perf_counter() - start) / len(found)
                values = " ".join(f"{value:.2f}" for value in found)
                print(f"{name:5} {method:16} {values}  ({seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    shares = [0.9, 0.8, 0.7, 0.6, 0.5, 0.45]
    parser.add_argument("--shares", type=float, nargs="*", default=shares)
    parser.add_argument("--uniform", nargs="*", choices=list(UNIFORM), default=list(UNIFORM))
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--test-images", type=int, default=5000)
    torch.set_num_threads(1)
    Study(parser.parse_args()).run()


if __name__ == "__main__":
    main()
