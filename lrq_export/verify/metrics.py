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


def cosine(got, reference) -> float:
    """Cosine of the angle between two tensors taken as vectors; 1 when both are zero, 0 when either is not finite."""
    got, reference = (np.asarray(each, np.float64).ravel() for each in (got, reference))
    if not (np.isfinite(got).all() and np.isfinite(reference).all()):
        return 0.0
    length = float(np.linalg.norm(got) * np.linalg.norm(reference))
    return float(got @ reference) / length if length else float(np.array_equal(got, reference))


def error_quantiles(got, reference, at=(0.5, 0.9, 0.99, 1.0)) -> dict[float, float]:
    """Quantiles of |got - reference| over the RMS of the reference (over 1 where that is 0); inf if not finite."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - reference)
    error[~np.isfinite(error)] = math.inf
    finite = reference[np.isfinite(reference)]
    rms = math.sqrt(np.square(finite).mean()) if finite.size else 0.0
    # An order statistic, not a mean of two: infinity must not become NaN.
    values = np.quantile(error, at, method="higher") / (rms or 1.0) if error.size else np.zeros(len(at))
    return {quantile: float(value) for quantile, value in zip(at, values, strict=True)}
