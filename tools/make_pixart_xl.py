"""Write a PixArt-XL/2 of random weights in diffusers layout: the true class at its true size, for scale and speed.

    python tools/make_pixart_xl.py FOLDER [--blocks 28]

At 256 pixels (32 x 32 latents, 256 tokens), the smallest size the family is published for. Linear layers start from a
truncated normal (std 0.02), as DiTs start; fp16, about 1.2 GB at 28 blocks.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file

from lrq_export.models.base import parameters_on_meta

SHARD_BYTES = 400 << 20


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """fp16 weights of one parameter; biases small but not zero, so that a lost one shows."""
    values = torch.empty(shape)
    if name.endswith(".bias"):
        values.normal_(0, 0.01, generator=generator)
    else:
        torch.nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator)
    return values.half()


def write_model(folder: Path, blocks: int, seed: int = 0) -> int:
    """Write config, scheduler and sharded weights; returns the number of parameters."""
    with parameters_on_meta():
        model = PixArtTransformer2DModel(sample_size=32, num_layers=blocks, caption_channels=4096)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    DDIMScheduler(clip_sample=False).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(2 * tensor.numel() for tensor in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = random_tensor(name, parameter.shape, generator)
    where = {}
    for index, shard in enumerate(shards):
        file = f"diffusion_pytorch_model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    parameters = sum(tensor.numel() for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=28)
    args = parser.parse_args()
    print(f"{args.folder}: {write_model(args.folder, args.blocks):,} parameters")


if __name__ == "__main__":
    main()
