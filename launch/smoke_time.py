"""How long the smoke run will take on this machine: `python -m launch.smoke_time`."""

import time
from dataclasses import dataclass

from data.cli import command

# Seconds of one pass below and of the whole smoke run, with nothing else running, on two cores of an Intel Xeon.
PASS, SMOKE = 0.085, 183
PASSES = 8


@dataclass
class SmokeTime:
    """Prints how long the smoke run will take on this machine, from a few micro batches of its net."""


def expected_seconds() -> float:
    """Seconds of the smoke run, from those that a micro batch of its net takes here, forward and backward."""
    # Imported here: it takes seconds, which are no part of what is measured.
    import torch

    from model.unet import UNet
    from train.compose import compose_config
    from train.inputs import resolve_text_shape

    torch.set_num_threads(1)
    config = compose_config(["+experiment=smoke", "data.tokens=16", "model.encoder_dim=64"])
    resolve_text_shape(config)
    unet, n, size = UNet(config.model), config.micro_batch, config.model.image_size
    x, t, text = torch.zeros(n, 3, size, size), torch.zeros(n, dtype=torch.long), torch.zeros(n, 16, 64)
    seconds = []
    for _ in range(PASSES):
        started = time.perf_counter()
        unet(x, t, text).sum().backward()
        seconds.append(time.perf_counter() - started)
    return SMOKE * min(seconds) / PASS


def tell(args: SmokeTime) -> None:
    """Print it."""
    seconds = expected_seconds()
    told = f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} minutes"
    print(f"The smoke run takes about {told} on this machine, as busy as it is now.")


def main(argv: list[str] | None = None) -> None:
    command(tell, SmokeTime, argv)


if __name__ == "__main__":
    main()
