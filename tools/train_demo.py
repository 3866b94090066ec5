"""Train a demo checkpoint on handwritten digits, in diffusers layout: PixArt, or the class-conditional DiT.

    python tools/train_demo.py FOLDER                    # 4400 steps of 32 digits, as examples/digits-pixart was made
    python tools/train_demo.py FOLDER --model dit        # the same for examples/digits-dit
    python tools/train_demo.py FOLDER --skip-training    # only record the calibration set again

Writes config.json, diffusion_pytorch_model.safetensors (fp16), scheduler_config.json, conditions.safetensors,
classifier.onnx, calibration.safetensors and training.json (what was run and what came out).
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrq_export.comparison.judge import FILE, Judge

CAPTION_TOKENS, CAPTION_CHANNELS = 4, 64
SAMPLING_STEPS = 20


def new_pixart() -> PixArtTransformer2DModel:
    """4 heads x 72 = 288 wide: like the real 1152, not a power of two."""
    return PixArtTransformer2DModel(
        sample_size=digits.IMAGE_SIZE, patch_size=2, in_channels=1, out_channels=1, num_layers=6,
        num_attention_heads=4, attention_head_dim=72, cross_attention_dim=288, caption_channels=CAPTION_CHANNELS,
    )  # fmt: skip


def new_dit() -> DiTTransformer2DModel:
    """4 heads x 60 = 240 wide, an adaLN of its own in every block."""
    return DiTTransformer2DModel(
        sample_size=digits.IMAGE_SIZE, patch_size=2, in_channels=1, out_channels=1, num_layers=6,
        num_attention_heads=4, attention_head_dim=60, num_embeds_ada_norm=digits.CLASSES,
    )  # fmt: skip


def captions(seed: int) -> dict[str, torch.Tensor]:
    """Caption embeddings (10, 4, 64): one fixed random short sequence per digit."""
    generator = torch.Generator().manual_seed(seed)
    return {"encoder_hidden_states": torch.randn(digits.CLASSES, CAPTION_TOKENS, CAPTION_CHANNELS, generator=generator)}


def labels_as_conditions(seed: int) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.arange(digits.CLASSES)}


@dataclass(frozen=True)
class Architecture:
    """A diffusers class to train, and what it is conditioned on: tensors by forward argument, one row per digit."""

    class_: type[nn.Module]
    new: Callable[[], nn.Module]
    conditions: Callable[[int], dict[str, torch.Tensor]]
    zero_at_start: tuple[str, ...]  # endings of linear layers that start at zero

    def new_model(self) -> nn.Module:
        """In eval mode throughout: diffusers' DiT would drop labels, in each block others."""
        model = self.new().eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                # As DiTs start (Peebles & Xie 2023). torch's uniform start would survive a short training and make
                # uniform quantization look better than it is on real checkpoints.
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
                if name.endswith(self.zero_at_start):
                    nn.init.zeros_(module.weight)
        return model


ARCHITECTURES = {
    "pixart": Architecture(PixArtTransformer2DModel, new_pixart, captions, ("proj_out",)),
    "dit": Architecture(DiTTransformer2DModel, new_dit, labels_as_conditions, ("norm1.linear", "proj_out_2")),
}


def rows_of(conditions: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor[labels] for name, tensor in conditions.items()}


def autocast_dtype() -> torch.dtype | None:
    """bfloat16 where the processor multiplies it natively; elsewhere it would be 20 times slower than fp32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def train(model, conditions, scheduler, *, steps: int, batch: int, rate: float, seed: int) -> dict:
    """ε-prediction with AdamW, cosine rate and an exponential moving average; returns the record of the run."""
    images, labels = digits.load_images()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    average = copy.deepcopy(model).requires_grad_(False)
    dtype, started, losses = autocast_dtype(), time.monotonic(), []
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        pick = torch.randint(len(images), (batch,), generator=generator)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        noise = torch.randn(images[pick].shape, generator=generator)
        noisy = scheduler.add_noise(images[pick], noise, timestep)
        # For 64 tokens plain matrix products are faster than the flash kernel, whose backward pass is slow on the CPU.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype, enabled=dtype is not None):
            predicted = model(noisy, timestep=timestep, **rows_of(conditions, labels[pick]), return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [each.detach() for each in model.parameters()], 1 - keep)
        losses.append(loss.item())
        if step % 50 == 49:
            elapsed = time.monotonic() - started
            print(
                f"step {step + 1}/{steps}  loss {sum(losses[-50:]) / 50:.4f}  {elapsed / (step + 1):.2f} s/step  "
                f"ETA {elapsed / (step + 1) * (steps - step - 1) / 60:.0f} min",
                flush=True,
            )
    model.load_state_dict(average.state_dict())
    return {
        "steps": steps, "batch": batch, "learning_rate": rate, "seed": seed, "dtype": str(dtype or torch.float32),
        "minutes": round((time.monotonic() - started) / 60, 1), "final_loss": round(sum(losses[-200:]) / 200, 5),
    }  # fmt: skip


@torch.no_grad()
def draw(model, conditions, scheduler, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw one image (n, 1, 16, 16) per label by DDIM in 20 steps."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(SAMPLING_STEPS)
    latents = torch.randn(len(labels), 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        steps = timestep.expand(len(labels))
        noise = model(latents, timestep=steps, **rows_of(conditions, labels), return_dict=False)[0]
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def score(model, conditions, scheduler, judge: Judge) -> dict:
    """Accuracy of 500 drawn digits and their Fréchet distance to the real ones."""
    labels = torch.arange(500) % digits.CLASSES
    images = torch.cat([draw(model, conditions, scheduler, part, 1000 + i) for i, part in enumerate(labels.split(100))])
    accuracy, frechet = digits.scores(judge, images, labels)
    return {"samples": len(labels), "accuracy": round(accuracy, 4), "frechet": round(frechet, 3)}


def save_model(model, folder: Path) -> None:
    """Stored as fp16: the tool must cope with half-precision sources."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def record_calibration(model, conditions, scheduler, path: Path) -> None:
    """Record what the denoiser sees over 20-step trajectories of all ten digits; keep 160 of those calls."""
    from lrq_export.calibrate.record import record
    from lrq_export.sampling import ConditionalSampler

    sampler = ConditionalSampler(model, scheduler, conditions)
    generator = torch.Generator().manual_seed(7)  # goes on from call to call: other latents for every digit
    record(
        sampler, list(range(digits.CLASSES)) * 2, path,
        samples=160, num_inference_steps=SAMPLING_STEPS, generator=generator,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="pixart")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-training", action="store_true", help="keep the weights, record calibration again")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[args.model]
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)

    if args.skip_training:
        conditions = load_file(args.out / "conditions.safetensors")
        model = architecture.class_.from_pretrained(args.out, torch_dtype=torch.float32)
    else:
        classifier, held_out = digits.train_classifier(args.seed)
        digits.save_classifier(classifier, args.out / FILE)
        print(f"classifier: {held_out:.4f} of held-out real digits", flush=True)
        torch.manual_seed(args.seed)
        model, conditions = architecture.new_model(), architecture.conditions(args.seed)
        save_file(conditions, args.out / "conditions.safetensors")
        facts = train(model, conditions, scheduler, steps=args.steps, batch=args.batch, rate=args.rate, seed=args.seed)
        save_model(model, args.out)
        scheduler.save_pretrained(args.out)
        model = model.float()
        facts |= score(model.eval(), conditions, scheduler, Judge(args.out / FILE))
        (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(facts))
    model.eval()
    record_calibration(model, conditions, scheduler, args.out / "calibration.safetensors")


if __name__ == "__main__":
    main()
