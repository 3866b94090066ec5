"""One formula for each figure of the report; arguments are (got, reference), any shape, compared in float64."""

import math

import numpy as np


def nmse(got, reference) -> float:
    """Normalized mean squared error Σ(got - reference)² / Σ reference²; 0 when equal, inf when either is not finite."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    if got.shape != reference.shape:
        raise ValueError(f"shapes differ: {got.shape} and {reference.shape}")
    if not (np.isfinite(got).all() and np.isfinite(reference).all()):
        return math.inf
    error, power = np.square(got - reference).sum(), np.square(reference).sum()
    if power == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / power)


def psnr(got, reference, peak_to_peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB for images whose values span `peak_to_peak` (2 for [-1, 1])."""
    mse = float(np.square(np.asarray(got, np.float64) - np.asarray(reference, np.float64)).mean())
    return math.inf if mse == 0 else 10 * math.log10(peak_to_peak**2 / mse)
