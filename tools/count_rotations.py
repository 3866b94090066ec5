"""Which rotations are left online in each model family, and that each one's graph still computes the same.

    python tools/count_rotations.py [--only FLUX.1-dev] [--no-proof] [--write docs/graph.md | --check docs/graph.md]

Every family at its published widths with two blocks of each kind, rotations chosen by shape: traced, rewritten, every
pass proved in ONNX Runtime on random weights, and the rotations counted. --write puts the table into a document,
--check compares it with the one that is there. Exits 1 if they differ, or if rotations take more than 2 % of the work
of a block.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from graphs.checks import check
from graphs.online import BlockWork, work_by_block
from graphs.passes import PIPELINE
from graphs.traced import TracedGraph
from lrq_export.calibrate.inputs import synthetic_inputs
from lrq_export.models import FAMILIES
from lrq_export.models.base import InputSpec
from lrq_export.plan import plan_layers
from lrq_export.proof import Proof
from lrq_export.recipe import load_recipe
from lrq_export.rewrite import rewrite
from lrq_export.trace import trace

BEGIN, END = "<!-- rotations: made by tools/count_rotations.py -->", "<!-- end of rotations -->"
# What differs from the defaults of diffusers, which are FLUX.1-dev, Wan 14B and DiT-XL/2.
CONFIGS: dict[str, dict[str, Any]] = {
    "PixArt-XL/2": {
        "_class_name": "PixArtTransformer2DModel", "num_layers": 2, "sample_size": 32, "caption_channels": 4096,
    },
    "DiT-XL/2": {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "out_channels": 8},
    "FLUX.1-dev": {
        "_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 2, "guidance_embeds": True,
    },
    "SD3-medium": {
        "_class_name": "SD3Transformer2DModel", "num_layers": 2, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pos_embed_max_size": 96, "out_channels": 16,
    },
    "Wan2.1-T2V-14B": {"_class_name": "WanTransformer3DModel", "num_layers": 2},
}  # fmt: skip
MOST = 0.02  # of a block's work
SIZES = {"height": 16, "width": 16, "frames": 2, "text": 12, "tokens": 48}


def count(name: str, prove: bool = True) -> dict[str, tuple[BlockWork, BlockWork]]:
    """For every block its work before and after the passes, each of them proved or only checked."""
    family = FAMILIES[CONFIGS[name]["_class_name"]]
    recipe, model = load_recipe(overrides={"rotation.kind": "hadamard"}), family.construct(CONFIGS[name])
    config = dict(model.config)
    started = time.perf_counter()
    traced = trace(family, config, plan_layers(model, family, recipe))
    seconds = time.perf_counter() - started
    after, moved = _rewrite(traced, family.inputs(config), recipe.gates.parity_nmse) if prove else _pass(traced)
    print(
        f"{name}: traced in {seconds:.0f} s, rewritten in {time.perf_counter() - started - seconds:.0f} s, "
        f"{len(traced.graph.nodes)} nodes to {len(after.graph.nodes)}, {moved}"
    )
    before, left = work_by_block(traced), work_by_block(after)
    return {block: (before[block], left[block]) for block in left if block}


def _rewrite(traced: TracedGraph, specs: dict[str, InputSpec], bound: float) -> tuple[TracedGraph, str]:
    """The graph after all passes, each proved, and how far its answers moved at most."""
    sizes = {axis: size for axis, size in SIZES.items() if any(axis in spec.shape for spec in specs.values())}
    recorded = synthetic_inputs(specs, 1, timesteps=1, seed=0, sizes=sizes)
    moved: list[float] = []
    after = rewrite(
        traced, PIPELINE, Proof(specs, recorded, None), bound,
        done=lambda _, outcome: moved.append(outcome.nmse or 0.0),
    )  # fmt: skip
    return after, f"every pass proved, answers moved by NMSE {max(moved):.0e} at most"


def _pass(traced: TracedGraph) -> tuple[TracedGraph, str]:
    after = traced.copy()
    for step in PIPELINE:
        step(after)
        check(after)
    return after, "no pass proved"


def table(counted: dict[str, dict[str, tuple[BlockWork, BlockWork]]]) -> str:
    """Markdown, one row for every kind of block: its first, since a last one may lack a part."""
    lines = [
        "| model | block | rotations as traced | left online | of these fused | share of the work |",
        "|---|---|---|---|---|---|",
    ]
    for model, blocks in counted.items():
        kinds = {block.rpartition(".")[0]: each for block, each in reversed(blocks.items())}
        for kind, (before, after) in reversed(kinds.items()):
            lines.append(
                f"| {model} | `{kind}` | {before.rotations} | {after.rotations} | {after.fused} | {after.share:.2%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CONFIGS)
    parser.add_argument("--no-proof", action="store_true")
    document = parser.add_mutually_exclusive_group()
    document.add_argument("--write", type=Path)
    document.add_argument("--check", type=Path)
    args = parser.parse_args()
    counted = {name: count(name, not args.no_proof) for name in CONFIGS if args.only in (None, name)}
    made = table(counted)
    print(made)
    if args.write is not None:
        text = args.write.read_text()
        before, _, rest = text.partition(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    if args.check is not None and (lacking := not_in(args.check.read_text(), made)):
        sys.exit(f"{args.check}: its table of rotations has not: {' '.join(lacking)}")
    dear = dear_blocks(counted)
    if dear:
        sys.exit(f"rotations take more than {MOST:.0%} of the work of {', '.join(dear)}")


def not_in(document: str, made: str) -> list[str]:
    """The rows of a table that a document's table does not have; --only makes but some of them."""
    written = document.partition(BEGIN)[2].partition(END)[0].splitlines()
    return [row for row in made.splitlines() if row not in written]


def dear_blocks(counted: dict[str, dict[str, tuple[BlockWork, BlockWork]]]) -> list[str]:
    """The blocks whose rotations cost more than they may."""
    return [f"{model} {block}" for model, blocks in counted.items() for block, (_, left) in blocks.items()
            if left.share > MOST]  # fmt: skip


if __name__ == "__main__":
    main()
