"""The bill before a GPU-hour is spent: memory, time, bytes, of the real net on tensors without contents.

    python -m launch.plan +experiment=if_i_xl gpu=a100-80g nodes=64

Takes the overrides of train/main.py beside its own arguments, see Options.
"""

from launch.compose import own_and_config
from launch.cost.estimate import Options, make_plan


def main(argv: list[str] | None = None) -> None:
    from launch.cost.page import render

    options, config = own_and_config(Options, argv)
    try:
        print(render(make_plan(options, config)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
