"""The nets, batches and losses that the parts share. Only this file and trainer.py know how the project builds them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.config import RECOMPUTE, UNetConfig
from model.diffusion import Diffusion
from model.losses import training_losses
from model.super_resolution import make_net
from model.unet import UNet
from tests.gpu_check.check import Check

TIMESTEPS, TOKENS = 1000, 77
FEW_BIT = "gelu_3bit"
KEEP, *_ = RECOMPUTE
WIDTHS = {"M": 192, "L": 320, "512": 512, "XL": 704}
# The micro batches of conf/experiment; that of the 512-wide net is between L's and XL's.
CONFIGURED = {"M": 24, "L": 8, "512": 8, "XL": 6, "II-L": 6}

TINY = UNetConfig(
    image_size=16, model_channels=64, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[8],
    num_head_channels=16, encoder_dim=48, encoder_channels=64, att_pool_heads=4,
)  # fmt: skip
# Compiled in seconds, with every kind of block that the released nets have.
SMALL = UNetConfig(
    image_size=32, model_channels=128, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[16],
    encoder_dim=256, encoder_channels=512, att_pool_heads=8,
)  # fmt: skip
# The second stage, as conf/model/if_ii_l.yaml has it.
SECOND = UNetConfig(
    image_size=256, low_res_size=64, model_channels=160, channel_mult=[1, 2, 4, 6, 8], num_res_blocks=[2, 2, 3, 5, 5],
    attention_resolutions=[32, 16], scale_skip_connection=True, encoder_channels=1280, encoder_dim=4096,
)  # fmt: skip


def shape(check: Check, name: str) -> UNetConfig:
    """The net of a name of WIDTHS, 'II-L', or 'small' and 'small II'; with the exact GELU."""
    if name in ("II-L", "small II"):
        small = replace(TINY if check.tiny else SMALL, low_res_size=8, scale_skip_connection=True)
        return small if check.tiny or name == "small II" else SECOND
    if check.tiny:
        return TINY
    if name == "small":
        return SMALL
    return UNetConfig(model_channels=WIDTHS[name], encoder_channels=4 * WIDTHS[name], encoder_dim=4096)


def build(
    config: UNetConfig, device: str, dtype: torch.dtype = torch.float32, activation: str = "gelu",
    recompute: str = KEEP, like: nn.Module | None = None, layout: str = "nchw",
) -> UNet:  # fmt: skip
    """A net with random weights, no layer of zeros; or with the very parameters of `like`, not a copy of them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta" if like else device):
            net = make_net(replace(config, activation=activation), recompute, layout)
    finally:
        torch.set_default_dtype(before)
    if like:
        net.load_state_dict(like.state_dict(keep_vars=True), assign=True)
        for module in net.modules():
            if hasattr(module, "levels"):  # the table of the few-bit GELU, which is in no state dict
                module.to_empty(device=device)
        return net
    return randomise(net)


@torch.no_grad()
def randomise(net: UNet) -> UNet:
    """Random values for every parameter: fresh nets have layers of zeros, behind which nothing could be compared."""
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


class Peer(nn.Module):
    """diffusers' net of the same shape, called as ours is."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel  # not at the top: most parts do without

        from model.convert import diffusers_config

        self.net = UNet2DConditionModel(**diffusers_config(config))

    def forward(self, x: Tensor, t: Tensor, text_emb: Tensor, *low_res: Tensor) -> Tensor:
        if low_res:
            images, aug_t = low_res
            return self.net(torch.cat([x, images], 1), t, text_emb, class_labels=aug_t, return_dict=False)[0]
        return self.net(x, t, text_emb, return_dict=False)[0]


def build_peer(config: UNetConfig, device: str, dtype: torch.dtype) -> Peer:
    """diffusers' net with fresh weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Peer(config)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class Images:
    """A micro batch on the device. x_start, noise: [N, C, H, W] fp32; t: [N]; text_emb: [N, TOKENS, encoder_dim].

    low_res: of the second stage, its noised small images, as x_start in the text's dtype, and their timesteps [N].
    """

    x_start: Tensor
    t: Tensor
    noise: Tensor
    text_emb: Tensor
    low_res: tuple[Tensor, ...] = ()

    def inputs(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What a net of the dtype takes, with x for the noised images."""
        low_res = tuple(value.to(dtype) if value.is_floating_point() else value for value in self.low_res)
        return (x.to(dtype), self.t, self.text_emb.to(dtype), *low_res)


def images(config: UNetConfig, n: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Images:
    """Random images and text states, made on the device; the same ones for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (n, config.in_channels, config.image_size, config.image_size)
    made = Images(
        torch.rand(size, generator=generator, device=device) * 2 - 1,
        torch.randint(TIMESTEPS, (n,), generator=generator, device=device),
        torch.randn(size, generator=generator, device=device),
        torch.randn(n, TOKENS, config.encoder_dim, generator=generator, device=device, dtype=dtype),
    )
    if not config.low_res_size:
        return made
    low_res = torch.randn(size, generator=generator, device=device, dtype=dtype)
    return replace(made, low_res=(low_res, torch.randint(TIMESTEPS, (n,), generator=generator, device=device)))


class Step:
    """Forward, training loss and backward of a micro batch, as the trainer makes them; no optimizer.

    net: ours, or a Peer, whose inputs must have the dtype of its parameters.
    """

    def __init__(self, net: nn.Module, batch: Images) -> None:
        self.net, self.batch = net, batch
        self.diffusion = Diffusion(TIMESTEPS).to(batch.x_start.device)
        self.dtype = next(net.parameters()).dtype

    def loss(self) -> Tensor:
        """The mean of the training losses."""
        b = self.batch
        x_t = self.diffusion.q_sample(b.x_start, b.t, b.noise)
        output = self.net(*b.inputs(x_t, self.dtype))
        return training_losses(self.diffusion, output, b.x_start, x_t, b.t, b.noise)["loss"].mean()

    def __call__(self) -> None:
        self.net.zero_grad(set_to_none=True)
        self.loss().backward()


def backend(check: Check) -> str:
    """inductor, which makes Triton kernels; on a CPU what comes before it, which needs no compiler."""
    return "inductor" if check.on_gpu else "aot_eager"


def allow_many_compilations() -> None:
    """All Stages share one code object, as all nets do: at its default of 8 torch would give up."""
    import torch._dynamo.config as config

    for name in ("recompile_limit", "cache_size_limit"):  # its name today, and in torch before 2.7
        if hasattr(config, name):
            setattr(config, name, 512)


def compile_whole(net: nn.Module, check: Check) -> nn.Module:
    """Compile the forward as one graph (diffusers' net in several, where it breaks); returns the net.

    The forward alone, as train/loop.py does: DeepSpeed hangs hooks on the module that can't be traced.
    """
    allow_many_compilations()
    whole = torch.compile(net.forward, fullgraph=isinstance(net, UNet), dynamic=False, backend=backend(check))
    net.forward = whole  # type: ignore[method-assign]
    return net


def compile_stages(net: UNet, check: Check) -> UNet:
    """Compile each Stage by itself, and what comes before and after them; returns the net."""
    allow_many_compilations()
    net.compile_stages(backend(check))
    return net


def results(
    net: nn.Module, batch: Images, named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
) -> dict[str, Tensor]:
    """The output as 'out', and the gradient of a fixed weighted sum of it by each parameter's name.

    named: what the gradients are renamed with.
    """
    net.zero_grad(set_to_none=True)
    dtype = next(net.parameters()).dtype
    out = net(*batch.inputs(batch.noise, dtype))
    generator = torch.Generator(out.device).manual_seed(7)
    weight = torch.randn(out.shape, generator=generator, device=out.device)
    (out * weight.to(dtype)).sum().backward()
    found = named({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    net.zero_grad(set_to_none=True)
    return {"out": out.detach(), **found}


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, of the norm of what is expected; infinite for what is not finite."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")


def all_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str, float]:
    """Distance of all gradients taken as one vector, then the name and distance of the worst.

    Raises: ValueError where one has gradients that the other lacks.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of one net alone: {sorted(found.keys() ^ expected.keys())[:4]}")
    squares, size, each = 0.0, 0.0, {}
    for name, value in expected.items():
        # A constant added to every key changes no softmax: this gradient is rounding alone.
        if name == "out" or name.endswith(("pool.k_proj.bias", "encoder_pooling.1.k_proj.bias")):
            continue
        each[name] = distance(found[name], value)
        squares += float((found[name].double() - value.double()).square().sum())
        size += float(value.double().square().sum())
    worst = max(each, key=lambda name: each[name])
    total = (squares / size) ** 0.5
    return (total if total == total else float("inf")), worst, each[worst]


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal to the bit."""
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def exact_arithmetic() -> None:
    """No TF32: fp32 is fp32, in matrix products and in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
