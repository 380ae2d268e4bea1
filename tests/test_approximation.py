"""Structured against original on data: identities, and an example counted by hand."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from structconv_cli.approximation import Approximation, compare_models, compare_outputs
from structconv_cli.tasks.task import Metric

Array = npt.NDArray[np.float32]


def linear(weight: Array) -> object:
    return lambda x: x.reshape(len(x), -1) @ weight


def batches(sizes: tuple[int, ...], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 2, 2, 1, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def random_weight(seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_a_model_agrees_with_itself(seed: int) -> None:
    model = linear(random_weight(seed))
    result = compare_models(model, model, batches((3, 5), seed))  # type: ignore[arg-type]
    assert (result.examples, result.agreement, result.output_difference) == (8, 100, 0)
    assert result.original == result.structured


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.25])
def test_scaling_changes_the_outputs_by_its_factor_and_no_class(factor: float) -> None:
    weight = random_weight(0)
    scaled = linear(np.float32(factor) * weight)
    result = compare_models(linear(weight), scaled, batches((7, 2)))  # type: ignore[arg-type]
    assert result.agreement == 100
    assert result.output_difference == pytest.approx(abs(factor - 1), rel=1e-5)


def test_opposite_models_never_agree_on_two_classes() -> None:
    weight = random_weight(0)[:, :2]
    result = compare_models(linear(weight), linear(-weight), batches((20,)))  # type: ignore[arg-type]
    assert result.agreement == 0
    assert result.output_difference == pytest.approx(2, rel=1e-5)


def test_the_way_images_are_batched_does_not_matter() -> None:
    models = linear(random_weight(0)), linear(random_weight(1))
    whole = batches((12,))
    (images, labels) = whole[0]
    parts = [(images[:5], labels[:5]), (images[5:6], labels[5:6]), (images[6:], labels[6:])]
    first, second = (compare_models(*models, data) for data in (whole, parts))  # type: ignore[arg-type]
    assert first.output_difference == pytest.approx(second.output_difference, rel=1e-6)
    assert first.agreement == second.agreement
    assert first.original == second.original
    assert first.structured == second.structured


def test_an_example_counted_by_hand() -> None:
    original = np.array([[3, 4], [0, 2], [5, 0], [1, 0]], np.float32)
    structured = np.array([[4, 3], [0, 2], [2, 4], [1, 0]], np.float32)
    images = torch.zeros(4, 1, 1, 1)
    labels = torch.tensor([1, 1, 1, 1])
    result = compare_models(lambda _: original, lambda _: structured, [(images, labels)])
    # classes: original 1 1 0 0, structured 0 1 1 0; differences sqrt(2)/5, 0, 5/5, 0.
    assert result == Approximation(
        examples=4,
        metric=Metric("top-1 accuracy", "%"),
        original=50,
        structured=50,
        agreement=50,
        output_difference=pytest.approx((2**0.5 / 5 + 1) / 4),
    )


def test_a_zero_output_is_compared_without_failing() -> None:
    zeros = np.zeros((2, 3), np.float32)
    data = [(torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64))]
    assert compare_models(lambda _: zeros, lambda _: zeros, data).output_difference == 0


def test_masks_counted_by_hand() -> None:
    """Two pixels of each image; the second of the last image is ignored."""
    original, structured = (
        np.eye(3, dtype=np.float32)[np.array(classes)].transpose(0, 3, 1, 2)
        for classes in ([[[0, 1]], [[1, 2]]], [[[0, 0]], [[1, 1]]])
    )
    masks = torch.tensor([[[0, 1]], [[0, 255]]])
    data = [(torch.zeros(2, 1, 1, 2), masks)]
    result = compare_models(lambda _: original, lambda _: structured, data)
    assert result.metric == Metric("mIoU", "%")
    # original: 0: 1 of 2, 1: 1 of 2; structured: 0: 1 of 3, 1: 0 of 2. Class 2 is ignored.
    assert result.original == pytest.approx(50)
    assert result.structured == pytest.approx(100 / 6)
    assert result.agreement == pytest.approx(100 * 2 / 3)


def test_scores_smaller_than_the_masks_are_enlarged() -> None:
    scores = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.nn.functional.interpolate(scores, (9, 7), mode="bilinear").argmax(1)
    result = compare_models(
        lambda _: scores.numpy(), lambda _: -scores.numpy(), [(torch.zeros(3, 1, 9, 7), masks)]
    )
    assert (result.original, result.structured, result.agreement) == (100, 0, 0)


def test_outputs_alone_are_compared_by_name_and_whole_numbers_left_out() -> None:
    before = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 1)), "c": np.ones(2, np.int64)}
    after = {"a": 1.5 * before["a"], "b": before["b"], "c": before["c"] + 1}
    result = compare_outputs(before, after, "here")
    assert result.output_difference == pytest.approx(0.25)
    assert (result.examples, result.metric, result.note) == (2, None, "here")
