"""Knowledge alignment and drop (Eq. 4)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.balancing.alignment import alignment_offset
from fbl_flower.config import ModelConfig, TrainConfig
from fbl_flower.data.examples import Examples
from fbl_flower.models import Classifier, new_classifier
from fbl_flower.seeding import torch_stream
from fbl_flower.training.evaluation import predict
from fbl_flower.training.loop import Augmentation, train

PLAIN = TrainConfig(
    epochs=1, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0, augment=False, precision="fp32"
)


def gradients(
    features: list[list[float]], vectors: list[list[float]], labels: list[int], synthetic: list[bool], *, drop: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients by P and by F of the mean cross-entropy, with head W = [[1, 0], [0, 1], [0, 0]] and no bias."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    f = torch.tensor(features, requires_grad=True)
    p = torch.tensor(vectors, requires_grad=True)
    y = torch.tensor(labels)
    offset = alignment_offset(p, y, torch.tensor(synthetic), drop=drop, rng=torch_stream(0, "drop"))
    F.cross_entropy((f + offset) @ weight.T, y).backward()
    assert p.grad is not None and f.grad is not None
    return p.grad, f.grad


ZERO = [[0.0, 0.0]] * 3


def test_gradient_of_one_synthetic_image_by_hand() -> None:
    """Logits W(F + P_0) = (0, 0, 0), softmax 1/3 each, minus one-hot of class 0: (-2/3, 1/3, 1/3); times W: (-2/3, 1/3)."""
    by_p, by_f = gradients([[0.0, 0.0]], ZERO, [0], [True])
    assert by_p.tolist() == pytest.approx(np.array([[-2 / 3, 1 / 3], [0, 0], [0, 0]]))
    assert by_f.tolist() == pytest.approx(np.array([[-2 / 3, 1 / 3]]))


def test_gradient_with_a_vector_that_is_not_zero_by_hand() -> None:
    """F = (1, 0), P_1 = (-1, ln 2): logits (0, ln 2, 0), softmax (1, 2, 1) / 4, minus one-hot of 1: (1/4, -1/2, 1/4); times W: (1/4, -1/2)."""
    by_p, by_f = gradients([[1.0, 0.0]], [[9.0, 9.0], [-1.0, math.log(2)], [9.0, 9.0]], [1], [True])
    assert by_p.tolist() == pytest.approx(np.array([[0, 0], [1 / 4, -1 / 2], [0, 0]]), abs=1e-6)
    assert by_f.tolist() == pytest.approx(np.array([[1 / 4, -1 / 2]]), abs=1e-6)


def test_gradient_of_a_batch_by_hand() -> None:
    """Two synthetic images of class 0 and a real one of class 1, all with softmax 1/3. The loss is a mean over three images:
    P_0 gets 2/3 of (-2/3, 1/3) = (-4/9, 2/9); the real image moves F by (1/3, -2/3) / 3 and no vector."""
    by_p, by_f = gradients(ZERO, ZERO, [0, 0, 1], [True, True, False])
    assert by_p.tolist() == pytest.approx(np.array([[-4 / 9, 2 / 9], [0, 0], [0, 0]]))
    assert by_f.tolist() == pytest.approx(np.array([[-2 / 9, 1 / 9], [-2 / 9, 1 / 9], [1 / 9, -2 / 9]]))


def test_a_dropped_vector_gets_no_gradient_and_its_image_trains_the_features_as_a_plain_one() -> None:
    vectors = [[5.0, -5.0]] * 3
    by_p, by_f = gradients([[0.0, 0.0]], vectors, [0], [True], drop=1.0)
    assert not by_p.any()
    assert by_f.tolist() == pytest.approx(np.array([[-2 / 3, 1 / 3]]))


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 1.0])
def test_drop_takes_the_vector_whole_from_a_share_of_the_synthetic_images(drop: float) -> None:
    """Of 10,000 images a share p loses P_i (standard deviation at most 0.005); what stays is not rescaled."""
    p = torch.tensor([[1.0, -2.0, 3.0]])
    labels, synthetic = torch.zeros(10_000, dtype=torch.int64), torch.ones(10_000, dtype=torch.bool)
    offset = alignment_offset(p, labels, synthetic, drop=drop, rng=torch_stream(0, "drop"))
    dropped = (offset == 0).all(1)
    assert dropped.double().mean().item() == pytest.approx(drop, abs=0.025 if 0 < drop < 1 else 0)
    assert torch.equal(offset[~dropped], p.expand(int((~dropped).sum()), 3))


def test_drop_is_drawn_anew_for_each_step() -> None:
    p, labels, synthetic = torch.ones(1, 1), torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.bool)
    rng = torch_stream(0, "drop")
    first, second = (alignment_offset(p, labels, synthetic, drop=0.5, rng=rng) for _ in range(2))
    assert not torch.equal(first, second)


def test_each_class_has_its_vector_and_real_images_have_none() -> None:
    p = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    offset = alignment_offset(
        p, torch.tensor([2, 0, 2, 1]), torch.tensor([True, True, False, False]), drop=0.0, rng=torch_stream(0, "drop")
    )
    assert offset.tolist() == [[5.0, 6.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def images_of(num: int, *, synthetic: bool) -> Examples:
    rng = torch_stream(0, "images")
    return Examples(
        images=torch.randint(0, 256, (num, 1, 8, 8), dtype=torch.uint8, generator=rng),
        labels=torch.randint(0, 10, (num,), generator=rng),
        synthetic=torch.full((num,), synthetic),
    )


def trained(
    examples: Examples, embeddings: nn.Parameter | None, config: TrainConfig = PLAIN, *, step: float = 0.0, drop: float = 0.5
) -> dict[str, torch.Tensor]:
    model = new_classifier(ModelConfig(name="tiny"), channels=1, num_classes=10, seed=0)
    train(
        model, examples, config=config, augmentation=Augmentation(shift=1, flip=False), rng=torch_stream(0, "train"),
        embeddings=embeddings, embedding_learning_rate=step, drop=drop,
    )  # fmt: skip
    return model.state_dict()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


SEVERAL_EPOCHS = TrainConfig(epochs=2, batch_size=8, learning_rate=0.1)
BOTH = pytest.mark.parametrize("config", [PLAIN, SEVERAL_EPOCHS], ids=["one-epoch", "epochs-and-augmentation"])


@BOTH
def test_zero_vectors_that_do_not_move_are_the_plain_model_bit_for_bit(config: TrainConfig) -> None:
    examples = images_of(20, synthetic=True)
    zero = nn.Parameter(torch.zeros(10, 32))
    assert same(trained(examples, zero, config), trained(examples, None, config))
    assert not zero.any()


@BOTH
def test_real_images_are_untouched_by_alignment(config: TrainConfig) -> None:
    """With real images only, vectors of any value change neither the model nor themselves."""
    examples = images_of(20, synthetic=False)
    vectors = nn.Parameter(torch.full((10, 32), 3.0))
    assert same(trained(examples, vectors, config, step=1.0, drop=0.0), trained(examples, None, config))
    assert (vectors == 3.0).all()


@BOTH
def test_dropping_always_is_no_alignment(config: TrainConfig) -> None:
    examples = images_of(20, synthetic=True)
    vectors = nn.Parameter(torch.full((10, 32), 3.0))
    assert same(trained(examples, vectors, config, step=1.0, drop=1.0), trained(examples, None, config))
    assert (vectors == 3.0).all()


def test_one_step_of_the_vectors_by_hand() -> None:
    """F(I) = I = (1, -1) (pixels 255 and 0), P = 0, head W = [[1, 0], [0, 1], [0, 0]]. P_2 steps by -lr W^T (softmax - one-hot),
    at its own learning rate 0.5, without momentum in the first step, weight decay or clipping."""
    model = Classifier(nn.Flatten(), 2, 3)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        model.head.bias.zero_()
    vectors = nn.Parameter(torch.zeros(3, 2))
    examples = Examples(
        images=torch.tensor([255, 0], dtype=torch.uint8).view(1, 1, 1, 2),
        labels=torch.tensor([2]),
        synthetic=torch.tensor([True]),
    )
    config = TrainConfig(
        epochs=1,
        batch_size=1,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.3,
        clip_norm=1e-3,
        augment=False,
        precision="fp32",
    )
    result = train(
        model, examples, config=config, augmentation=None, rng=torch_stream(0, "train"),
        embeddings=vectors, embedding_learning_rate=0.5, drop=0.0,
    )  # fmt: skip
    e = math.e
    total = e + 1 / e + 1
    assert vectors.tolist() == pytest.approx(np.array([[0, 0], [0, 0], [-0.5 * e / total, -0.5 / e / total]]), abs=1e-6)
    assert result.loss == pytest.approx(math.log(total), abs=1e-6)


def test_accuracy_on_synthetic_images_is_measured_with_and_without_the_vector() -> None:
    """The head calls everything class 0. P_1 moves class 1 to where it belongs: 1 of 3 synthetic images right without P, 2 with."""
    model = Classifier(nn.Flatten(), 2, 3)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        model.head.bias.zero_()
    vectors = nn.Parameter(torch.tensor([[0.0, 0.0], [-9.0, 9.0], [0.0, 0.0]]))
    examples = Examples(
        images=torch.tensor([255, 0], dtype=torch.uint8).expand(4, 1, 1, 2).contiguous(),
        labels=torch.tensor([0, 1, 2, 0]),
        synthetic=torch.tensor([True, True, True, False]),
    )
    result = train(
        model, examples, config=PLAIN, augmentation=None, rng=torch_stream(0, "train"),
        embeddings=vectors, embedding_learning_rate=0.0, drop=1.0,
    )  # fmt: skip
    assert result.synthetic_accuracy == pytest.approx(1 / 3)
    assert result.aligned_accuracy == pytest.approx(2 / 3)


def test_there_is_no_vector_at_test_time() -> None:
    """Features and logits of an evaluation are F(I) and H(F(I)), whatever the images were in training."""
    model = new_classifier(ModelConfig(name="tiny"), channels=1, num_classes=10, seed=0)
    examples = images_of(6, synthetic=True)
    features, logits = predict(model, examples.images)
    x = examples.images.float() / 127.5 - 1
    assert torch.allclose(features, model.features(x), atol=1e-6)
    assert torch.allclose(logits, model(x), atol=1e-6)
