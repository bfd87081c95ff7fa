"""Writes the metrics to metrics.jsonl, to Weights & Biases and for TensorBoard; the only file that imports wandb.

RUN_DIR/starts.jsonl gets a line for each start of the run (train/monitor/provenance.py).
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import wandb

from data.checks import count
from data.storage.atomic import atomic_file
from train.config import Config
from train.monitor.event_files import EventFiles
from train.monitor.provenance import describe_start
from train.monitor.run_log import METRICS, STARTS, read_metrics, sample_grids

logger = logging.getLogger(__name__)

# The name of the grids. `samples` is a metric, and a name can be of one kind only.
SAMPLE_GRID = "sample_grid"


def check_login(mode: str) -> None:
    """Check that W&B knows the user, if the run shall be sent there.

    Raises: ValueError if nobody is logged in on this machine.
    """
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "wandb.mode=online, but nobody is logged in: run `wandb login`, or set WANDB_API_KEY, "
            "or choose wandb.mode=offline or wandb.mode=disabled"
        )


class Tracker:
    """Writes a line for each logged step to RUN_DIR/metrics.jsonl, and the same to W&B and for TensorBoard.

    Only rank 0 has one.
    step: the step that the run resumes from. Later lines and sample grids of an earlier start are dropped, since those
    steps are made again.  selections: for that start's line.  lines: those that were kept.
    """

    def __init__(
        self, config: Config, run_dir: Path, step: int, selections: Sequence[dict | None] = ()
    ) -> None:  # fmt: skip
        self.path, self._name = run_dir / METRICS, run_dir.name
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        with atomic_file(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        if later := [grid for drawn, grid in sample_grids(run_dir) if drawn > step]:
            print(f"removes {count(len(later), 'sample grid')} after step {step}, where this start goes on", flush=True)
            for grid in later:
                grid.unlink()
        self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in close()
        start = describe_start(config, step, selections)
        with open(run_dir / STARTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
        self._events = EventFiles(run_dir, step) if config.tensorboard else None
        # An online run is resumed by its id. An offline run cannot be, so each start is a run of the same group.
        id_file = run_dir / "wandb_id"
        online = config.wandb.mode == "online"
        if online and not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        settings = {
            "project": config.wandb.project, "dir": run_dir, "group": run_dir.name,
            "config": start.pop("config") | {"start": start},
            # Online it prints where the run is to be seen. Offline there is nothing to see, and close() has one line.
            "settings": wandb.Settings(silent=not online),
        }  # fmt: skip
        self._run: wandb.Run | None
        try:
            resumed = {"id": id_file.read_text(), "resume": "allow"} if online else {}
            self._run = wandb.init(mode=config.wandb.mode, **settings, **resumed)
        except wandb.Error as error:  # without a network the training goes on all the same
            logger.warning(
                "W&B CANNOT BE REACHED (%s): this start is recorded in %s; `wandb sync` sends it later",
                str(error).splitlines()[0], run_dir / "wandb",
            )  # fmt: skip
            # W&B writes the id of the run that failed into the settings it is given, so these are new ones.
            self._run = wandb.init(mode="offline", **settings | {"settings": wandb.Settings(silent=True)})
        is_kept = self._run.offline and config.wandb.mode != "disabled"
        self._offline_run = Path(self._run.dir).parent if is_kept else None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Write the metrics of a step."""
        line = {"step": step, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._send(lambda run: run.log(line))
        if self._events:
            self._events.log(step, metrics)

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a picture of the run's folder to W&B, and write it for TensorBoard."""
        self._send(lambda run: run.log({"step": step, name: wandb.Image(str(path))}))
        if self._events:
            self._events.image(step, name, path)

    def alert(self, title: str, text: str) -> None:
        """Alert through W&B, which sends mail or a message if its user has asked for that."""
        self._send(lambda run: run.alert(f"{self._name}: {title}", text, level=wandb.AlertLevel.ERROR))

    def close(self) -> None:
        """Close the files and finish the W&B run."""
        self._file.close()
        if self._events:
            self._events.close()
        self._send(lambda run: run.finish())
        if self._offline_run:
            print(f"W&B         {self._offline_run}  (`wandb sync` sends it)")

    def _send(self, action: Callable[[wandb.Run], object]) -> None:
        """Call W&B. Its own process may be gone, for example by a signal to the whole job: the training goes on."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            logger.warning("nothing more is sent to W&B in this start; %s has all metrics (%r)", self.path, error)
            self._run = None
