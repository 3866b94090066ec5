"""A made-up report of a comparison, in which everything can be varied."""

import pytest

from lrq_export.models.pixart import PixArt
from lrq_export.recipe import Recipe

PSNR = {(4, 8): (50.5, 41.25, 12.0), (3, 6): (30.0, 33.0, None)}
REASONS = {
    "tlq": {"blocks.0.to_q": "head Hadamard: output error 3.1e-4", "blocks.0.ff": "none: output error 2.2e-3"},
    "rtn": {"blocks.0.to_q": "none", "blocks.0.ff": "none"},
    "broken": {"blocks.0.to_q": "full Hadamard", "blocks.0.ff": "full Hadamard"},
}


def row(method, setting, psnr_db, **changes):
    published = method != "tlq"
    return {
        "method": method, "title": f"title of {method}", "published": published, "note": f"note of {method}",
        "obstacle": "its levels are floats" if published else None, "bits": setting[0], "act_bits": setting[1],
        "bits_per_weight": setting[0] + 0.28, "seconds": 12.34, "transforms": REASONS[method], "noise_nmse": 4.2e-4,
        "psnr_db": psnr_db, "psnr_db_by_seed": [psnr_db, psnr_db], "accuracy": 0.953, "frechet": 1.2345,
    } | changes  # fmt: skip


@pytest.fixture
def report():
    rows = [
        row(method, setting, psnr_db)
        for setting, values in PSNR.items()
        for method, psnr_db in zip(("tlq", "rtn", "broken"), values, strict=True)
    ]
    rows[0]["psnr_db_by_seed"] = [49.87, 51.13]
    # A model that gives NaN, for which there is no judge's figure either.
    rows[-1] |= {"psnr_db": float("nan"), "psnr_db_by_seed": [float("nan")] * 2, "noise_nmse": float("inf"),
                 "accuracy": None, "frechet": None}  # fmt: skip
    inputs = [
        {"layers": ["blocks.0.to_q", "blocks.0.to_k"], "width": 288, "rms": 1.02, "kurtosis": 31.5, "peak": 25.5,
         "peak_to_rms": 25.0},
        {"layers": ["blocks.0.ff"], "width": 1152, "rms": 0.25, "kurtosis": 3.1, "peak": 1.0, "peak_to_rms": 4.0},
    ]  # fmt: skip
    return {
        "schema": 1,
        "source": {"name": "digits", "class_name": "PixArt"},
        "machine": {"processor": "Xeon 8488C", "cores": 2, "features": ["avx2"]},
        "recipe": Recipe().for_family(PixArt()).model_dump(mode="json", by_alias=True),
        "warnings": ["no calibration was given"],
        "seeds": [5, 7],
        "images": 40,
        "reference": {"accuracy": 0.985, "frechet": 0.0},
        "inputs": inputs,
        "rows": rows,
    }
