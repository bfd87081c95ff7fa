"""Images a second of train.sampling.sampler and of diffusers' IFPipeline: the same weights, captions, steps, noise.

python -m tests.benchmarks.sampling_speed [net=smoke_64 images=8 steps=10 rounds=7]; net: smoke_64, small, 34M, M.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import IFPipeline
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.cli import command
from model.config import UNetConfig
from model.unet import UNet
from tests.benchmarks.nets import ROOT, size
from train.sampling.sampler import make_scheduler, sample
from train.weights.diffusers_folder import build_unet


@dataclass
class Speed:
    """Times our sampler and diffusers' in turn.

    net: smoke_64, small, 34M or M.
    images: drawn at a time, twice as many with guidance.
    steps: sampler steps.
    rounds: turns of each.
    guidance_scale: of both.
    """

    net: str = "smoke_64"
    images: int = 8
    steps: int = 10
    rounds: int = 7
    guidance_scale: float = 4.0


def config_of(net: str) -> UNetConfig:
    """conf/model/small.yaml on embeddings of T5-XXL's width, the net of smoke_64 on narrow ones, or size(net)."""
    if net not in ("small", "smoke_64"):
        return size(net)
    smoke = {**OmegaConf.load(ROOT / "conf/experiment/smoke_64.yaml").model, "encoder_dim": 64}
    parts = OmegaConf.load(ROOT / "conf/model/small.yaml"), smoke if net == "smoke_64" else {"encoder_dim": 4096}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(UNetConfig), *parts))  # type: ignore[return-value]


def text_share(config: UNetConfig) -> float:
    """FLOP of projecting and pooling a caption, as a share of those of a step without."""
    with torch.device("meta"):
        unet, x, t = UNet(config), torch.empty(1, 3, config.image_size, config.image_size), torch.zeros(1)
        with FlopCounterMode(display=False) as of_text:
            text = unet.encode_text(torch.empty(1, 77, config.encoder_dim))
        with FlopCounterMode(display=False) as of_step:
            unet(x, t, text)
    return of_text.get_total_flops() / of_step.get_total_flops()


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall-clock time of a call, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


@torch.no_grad()
def measure(args: Speed) -> None:
    """Print one row of the table."""
    torch.manual_seed(0)
    config = config_of(args.net)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    text_emb, empty = torch.randn(args.images, 77, config.encoder_dim), torch.randn(77, config.encoder_dim)
    scheduler = make_scheduler(1000, config.learn_sigma)
    pipeline = IFPipeline(
        tokenizer=None, text_encoder=None, unet=build_unet(unet.state_dict(), config, torch.float32).eval(),
        scheduler=make_scheduler(1000, config.learn_sigma), safety_checker=None, feature_extractor=None,
        watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> Tensor:
        return sample(unet, scheduler, text_emb, empty, args.guidance_scale, args.steps, range(args.images))

    def theirs() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(args.images)]
        images = pipeline(
            prompt_embeds=text_emb, negative_prompt_embeds=empty.expand_as(text_emb), output_type="np",
            guidance_scale=args.guidance_scale, num_inference_steps=args.steps, generator=generators,
        ).images  # fmt: skip
        return torch.from_numpy(images * 255).round().permute(0, 3, 1, 2)

    times: list[tuple[float, float]] = []
    apart = 0.0
    for _ in range(args.rounds + 1):
        (a, of_ours), (b, of_theirs) = seconds(ours), seconds(theirs)
        times.append((a, b))
        apart = max(apart, float((of_ours.float() - of_theirs).abs().max()))
    ratios = [b / a for a, b in times[1:]]  # the first round warms up
    rates = [args.images / statistics.median(column) for column in zip(*times[1:], strict=True)]
    print(
        "| net, parameters | images, steps | ours, images/s | IFPipeline | ratio (smallest, largest) | text | apart |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    print(
        f"| {args.net}, {sum(p.numel() for p in unet.parameters()) / 1e6:,.1f} M | {args.images}, {args.steps} "
        f"| {rates[0]:.3f} | {rates[1]:.3f} | {statistics.median(ratios):.3f} ({min(ratios):.2f}, {max(ratios):.2f}) "
        f"| {text_share(config):.1%} | {apart:.0f}/255 |"
    )


def main(argv: list[str] | None = None) -> None:
    command(measure, Speed, argv)


if __name__ == "__main__":
    main()
