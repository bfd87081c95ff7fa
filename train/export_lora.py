"""The LoRA of a run for diffusers' pipeline of its stage: `python -m train.export_lora checkpoint=RUN_DIR out=DIR`."""

from dataclasses import dataclass
from pathlib import Path

from data.checks import check_absent
from data.cli import command, location
from data.storage.atomic import atomic_folder
from train.checkpoint.format import check_weights


@dataclass
class ExportLora:
    """Writes the LoRA that a run trained as a folder for load_lora_weights of diffusers.

    checkpoint: the folder of a run, whose newest checkpoint is taken, or of one step
    out: the folder to write
    weights: ema (their moving average) or master
    ema_length: of another average, as a share of the steps up to the checkpoint: a standard deviation such as 0.1
    """

    checkpoint: str = location()
    out: str = location()
    weights: str = "ema"
    ema_length: float | None = None


def export_lora(args: ExportLora) -> None:
    """Write the folder.

    Raises: ValueError for what cannot be exported; OSError if it cannot be written.
    """
    check_weights(args.weights, args.ema_length)
    check_absent("out", args.out)
    # Imported here: they take seconds to import, and --help and mistakes in the arguments are answered at once.
    from train.checkpoint.post_hoc import open_checkpoint
    from train.weights.lora import FILE, save_adapter

    out, checkpoint = Path(args.out), open_checkpoint(args.checkpoint, args.ema_length)
    pipeline = "IFSuperResolutionPipeline" if checkpoint.model.low_res_size else "IFPipeline"
    with atomic_folder(out) as folder:
        save_adapter(folder, checkpoint, args.weights)
    print(f"{out / FILE}: rank {checkpoint.config['lora']['rank']}, {checkpoint.title(args.weights)} weights of step "
          f"{checkpoint.step}; {pipeline}.load_lora_weights('{out}') adds it to the net of "
          f"{checkpoint.config['init_from']}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(export_lora, ExportLora, argv)


if __name__ == "__main__":
    main()
