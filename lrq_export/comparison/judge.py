"""A classifier as the judge of drawn images: whether they show what they should, and how far two sets of them differ.

It is an ONNX model that maps images (n, channels, height, width) to `features` (n, f) and `logits` (n, classes); class
k belongs to row k of the conditions that are sampled with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lrq_export.errors import InputError

FILE = "classifier.onnx"  # beside the transformer's weights
OUTPUTS = ("features", "logits")


class Judge:
    """Runs the classifier in ONNX Runtime."""

    def __init__(self, path: Path):
        """Raises InputError for a file that is no such classifier."""
        import onnxruntime

        if not path.is_file():
            raise InputError(f"{path}: no such file", hint="name an ONNX classifier of this model's images")
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for each kind of damage
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: ONNX Runtime cannot load it: {reason}", hint="export the classifier again"
            ) from error
        named = {output.name for output in self._session.get_outputs()}
        if not named.issuperset(OUTPUTS) or len(self._session.get_inputs()) != 1:
            raise InputError(
                f"{path}: got outputs {', '.join(sorted(named))}, needed one input and {' and '.join(OUTPUTS)}",
                hint="export the classifier with both",
            )

    def run(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (n, f) and logits float32 (n, classes) of images (n, channels, height, width).

        Raises InputError for images that it does not take.
        """
        (image,) = self._session.get_inputs()
        try:
            features, logits = self._session.run(list(OUTPUTS), {image.name: images.float().numpy()})
        except Exception as error:  # ONNX Runtime raises a class of its own for each kind of misfit
            raise InputError(
                f"{self._path}: got images {tuple(images.shape)}, needed {image.name} {image.shape}",
                hint="pass a classifier of this model's images",
            ) from error
        return features, logits


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is that of their label (n,)."""
    return float((logits.argmax(1) == labels).mean())


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance between Gaussian fits of two sets of features, each (n, f).

    NaN where a set has fewer than two images, whose covariance does not exist.
    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017, equation 6, with these features for Inception's.
    """
    if min(len(features), len(reference)) < 2:
        return float("nan")
    first, second = features.astype(np.float64), reference.astype(np.float64)
    gap = first.mean(0) - second.mean(0)
    cov_first, cov_second = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # tr (S1 S2)^(1/2) = sum of square roots of the eigenvalues of S1 S2, which are real and non-negative.
    eigenvalues = np.linalg.eigvals(cov_first @ cov_second).real.clip(min=0)
    return float(gap @ gap + np.trace(cov_first) + np.trace(cov_second) - 2 * np.sqrt(eigenvalues).sum())
