"""The cost of a run before it starts, its memory, time and bytes: `python -m launch.plan +experiment=if_i_xl nodes=64`.

Other arguments than its own are those of train/main.py.
"""

from data.cli import how_called, run_command
from launch.cost.options import PlanOptions
from train.compose import help_with_training, parse_with_config


def plan(argv: list[str]) -> None:
    """Print the plan.

    Raises: ValueError for arguments that cannot be, or a micro batch that does not divide the batch.
    """
    options, config = parse_with_config(PlanOptions, argv)
    # Imported here, since torch takes seconds.
    from launch.cost.estimate import make_plan
    from launch.cost.page import render

    print(render(make_plan(options, config)))


def main(argv: list[str] | None = None) -> None:
    run_command(plan, lambda: help_with_training(PlanOptions, how_called()), argv)


if __name__ == "__main__":
    main()
