"""The demo's data and its judge: real handwritten digits, a small classifier, a Fréchet distance.

The images are scikit-learn's copy of the UCI handwritten digits (1797 real 8x8 scans that ship with the library),
enlarged to 16x16 and scaled to [-1, 1].
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

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


def save_classifier(model: DigitClassifier, path: Path) -> None:
    save_file(model.state_dict(), path)


def load_classifier(path: Path) -> DigitClassifier:
    model = DigitClassifier()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images (n, 1, 16, 16) that the classifier reads as their intended label (n,)."""
    return (model(images).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def frechet_distance(model: DigitClassifier, images: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance between two image sets under Gaussian fits of the classifier's features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017, eq. 6, with these features for Inception's.
    """
    first, second = (model.features(x).double().numpy() for x in (images, reference))
    gap = first.mean(0) - second.mean(0)
    cov_first, cov_second = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # tr (S1 S2)^(1/2) = sum of square roots of the eigenvalues of S1 S2, which are real and non-negative.
    eigenvalues = np.linalg.eigvals(cov_first @ cov_second).real.clip(min=0)
    return float(gap @ gap + np.trace(cov_first) + np.trace(cov_second) - 2 * np.sqrt(eigenvalues).sum())
