"""LoRA beside the attention's projections, and as a file: `python -m train.export_lora checkpoint=RUN_DIR out=DIR`."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from data.cli import command
from train.weights.lora import FILE, trained_adapter


@dataclass
class Export:
    """Writes the LoRA that a run trained as a folder for IFPipeline.load_lora_weights.

    checkpoint: a run's folder, for its latest, or a step's folder. weights: ema or master.
    """

    checkpoint: str = MISSING
    out: str = MISSING
    weights: str = "ema"


def export(args: Export) -> None:
    """Write the folder aside, then rename.

    Raises: ValueError for what cannot be exported; OSError if it cannot be written.
    """
    from diffusers import IFPipeline

    from train.weights.pretrained import read_trained  # it reads fine-tuned runs, and so imports this

    out = Path(args.out)
    if out.exists():
        raise ValueError(f"'{out}' is there already: choose another out=, or delete it")
    trained = read_trained(args.checkpoint)
    lora = trained.run.get("lora", {"rank": 0})
    if not lora["rank"]:
        raise ValueError(f"'{trained.folder}' is of a whole net, not of a LoRA: `python -m train.export` takes it out")
    adapter = trained_adapter(trained.folder, args.weights, trained.run, trained.model)
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in adapter.lora})
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    IFPipeline.save_lora_weights(
        aside, adapter.lora,
        unet_lora_adapter_metadata={"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": modules},
    )  # fmt: skip
    os.replace(aside, out)
    print(f"{out / FILE}: rank {lora['rank']}, {args.weights} weights of step {trained.step}; "
          f"IFPipeline.load_lora_weights('{out}') lays it over the net of {trained.run['init_from']}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(export, Export, argv)


if __name__ == "__main__":
    main()
