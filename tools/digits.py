"""The demo's data and its judge: real handwritten digits, a small classifier, a Fréchet distance.

The images are scikit-learn's copy of the UCI handwritten digits (1797 real 8x8 scans that ship with the library),
enlarged to 16x16 and scaled to [-1, 1].
"""

from pathlib import Path

import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lrq_export.comparison.judge import OUTPUTS, Judge, accuracy, frechet_distance

IMAGE_SIZE = 16
CLASSES = 10


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (1797, 1, 16, 16) in [-1, 1] and labels (1797,)."""
    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return images * 2 - 1, torch.tensor(data.target, dtype=torch.long)


class DigitClassifier(nn.Module):
    """A small convolutional classifier; its 64 penultimate features define the Fréchet distance."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 1, 16, 16) to features (n, 64)."""
        return self.trunk(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images))


def train_classifier(seed: int = 0, epochs: int = 30) -> tuple[DigitClassifier, float]:
    """Train on four fifths of the digits; return the classifier and its accuracy on the held-out fifth."""
    images, labels = load_images()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    torch.manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(64):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            augmented = torch.roll(images[batch], shift, dims=(2, 3))
            augmented = augmented + 0.1 * torch.randn(augmented.shape, generator=generator)
            loss = F.cross_entropy(model(augmented), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return model, accuracy


class FeaturesAndLogits(nn.Module):
    """The classifier with both of the outputs that `lrq-export compare` asks of a judge."""

    def __init__(self, classifier: DigitClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.classifier.features(images)
        return features, self.classifier.head(features)


def save_classifier(model: DigitClassifier, path: Path) -> None:
    """Write it as an ONNX model with the outputs features (n, 64) and logits (n, 10)."""
    program = torch.onnx.export(
        FeaturesAndLogits(model).eval(), (torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("images")},), input_names=["images"], output_names=list(OUTPUTS),
    )  # fmt: skip
    model = program.model_proto
    for entity in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del entity.metadata_props[:]  # stack traces of this machine
    onnx.save(model, path)


def scores(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Share of images (n, 1, 16, 16) read as their label (n,), and the Fréchet distance to real ones."""
    features, logits = judge.run(images)
    real, _ = judge.run(load_images()[0])
    return accuracy(logits, labels.numpy()), frechet_distance(features, real)
