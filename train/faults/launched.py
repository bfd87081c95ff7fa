"""Whether a launcher gave this process a rank, where Slurm started several."""

from collections.abc import Mapping


def check_launched(environment: Mapping[str, str]) -> None:
    """Raises: ValueError if Slurm has several tasks here and no launcher made them ranks of one training."""
    # Of this step; the batch script itself, and what runs in it without srun, is one process and has no such variable.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in environment and "RANK" not in environment:
        raise ValueError(
            f"Slurm has {tasks} tasks, and no launcher made them ranks (no RANK): each would train alone in the one "
            "run_dir. `sbatch launch/slurm/train.sbatch +experiment=...` starts one launcher a node (in salloc: put "
            "launch/slurm/bin first on PATH, then `deepspeed train/main.py +experiment=...`); one process alone: "
            "srun --ntasks=1"
        )
