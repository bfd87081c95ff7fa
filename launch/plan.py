"""The bill before a GPU-hour is spent: memory, time, bytes, of the real net on tensors without contents.

    python -m launch.plan +experiment=if_i_xl gpu=a100-80g nodes=64

Takes the overrides of train/main.py beside its own arguments.
"""

from launch.compose import own_and_config
from launch.cost.options import PlanOptions


def main(argv: list[str] | None = None) -> None:
    # Imported here: they import torch, which takes seconds, and --help has no need of it.
    from launch.cost.estimate import make_plan
    from launch.cost.page import render

    options, config = own_and_config(PlanOptions, argv)
    try:
        print(render(make_plan(options, config)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
