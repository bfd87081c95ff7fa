"""Where metrics go: metrics.jsonl always, Weights & Biases when asked; the only file that knows wandb.

RUN_DIR/starts.jsonl has a line for each start of the run (train.monitor.provenance).
"""

import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import wandb

from train.config import Config
from train.monitor.provenance import describe_start
from train.monitor.run_log import METRICS, STARTS, read_metrics

logger = logging.getLogger(__name__)


def check_login(mode: str) -> None:
    """Raises: ValueError if runs shall be sent to W&B and no one is logged in on this machine."""
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "wandb.mode=online, but nobody is logged in: run `wandb login`, or set WANDB_API_KEY, "
            "or choose wandb.mode=offline or wandb.mode=disabled"
        )


class Tracker:
    """Writes one line a log step to RUN_DIR/metrics.jsonl and the same to W&B; only rank 0 has one.

    step: that the run goes on from; what an earlier start logged beyond it is dropped, since it will be made again.
    """

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        self.path, self._name = run_dir / METRICS, run_dir.name
        self.kept = kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)
        self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in close()
        start = describe_start(config, step)
        with open(run_dir / STARTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
        # Online one run goes on under its id; an offline run can't be resumed, so each start is a run of one group.
        id_file = run_dir / "wandb_id"
        online = config.wandb.mode == "online"
        if online and not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        settings = {
            "project": config.wandb.project, "dir": run_dir, "group": run_dir.name,
            "config": start.pop("config") | {"start": start},
        }  # fmt: skip
        self._run: wandb.Run | None
        try:
            resumed = {"id": id_file.read_text(), "resume": "allow"} if online else {}
            self._run = wandb.init(mode=config.wandb.mode, **settings, **resumed)
        except wandb.Error as error:  # no network is no reason not to train
            logger.warning(
                "W&B CANNOT BE REACHED (%s): this start is kept in %s, and `wandb sync` sends it later",
                str(error).splitlines()[0], run_dir / "wandb",
            )  # fmt: skip
            self._run = wandb.init(mode="offline", **settings)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line for a step."""
        line = {"step": step, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._tell(lambda run: run.log(line))

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a picture that lies in the run's folder."""
        self._tell(lambda run: run.log({"step": step, name: wandb.Image(str(path))}))

    def alert(self, title: str, text: str) -> None:
        """Tell by W&B, which sends mail or a message where its user has asked for it."""
        self._tell(lambda run: run.alert(f"{self._name}: {title}", text, level=wandb.AlertLevel.ERROR))

    def close(self) -> None:
        """Finish the W&B run."""
        self._file.close()
        self._tell(lambda run: run.finish())

    def _tell(self, what: Callable[[wandb.Run], object]) -> None:
        """W&B's own process may be gone, by a signal to all of a job for one: that is no reason to end a training."""
        if self._run is None:
            return
        try:
            what(self._run)
        except Exception as error:
            logger.warning("W&B is told no more in this start, %s has it all (%r)", self.path, error)
            self._run = None
