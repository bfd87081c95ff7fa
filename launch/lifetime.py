"""The days of a run with their faults, simulated: `python -m launch.lifetime +experiment=if_i_xl nodes=64`.

Other arguments than its own are those of train/main.py.
"""

from pathlib import Path

from data.cli import how_called, run_command
from launch.interruptions.options import LifetimeOptions
from train.compose import help_with_training, parse_with_config


def lifetime(argv: list[str]) -> None:
    """Print the page, and draw the chart if asked.

    Raises: ValueError for arguments that cannot be, or a micro batch that does not divide the batch.
    """
    options, config = parse_with_config(LifetimeOptions, argv)
    # Imported here, since torch takes seconds.
    from launch.interruptions.from_plan import make_life
    from launch.interruptions.page import render

    life, sizes = make_life(options, config)
    print(render(life, options, sizes))
    if options.chart:
        from launch.interruptions.chart import draw

        draw(life, options, Path(options.chart))


def main(argv: list[str] | None = None) -> None:
    run_command(lifetime, lambda: help_with_training(LifetimeOptions, how_called()), argv)


if __name__ == "__main__":
    main()
