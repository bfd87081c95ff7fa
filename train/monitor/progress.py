"""What the user sees of a run: its progress, the metrics, the sample grids and, at the end, where the files are."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.loader.prompts import prompts_with_low_res, stored_prompts
from data.progress import Progress
from data.text.embeddings import read_empty
from model.super_resolution import enlarge
from model.unet import UNet
from train.checkpoint.format import latest_checkpoint
from train.config import Config
from train.faults.preempt import mark_done
from train.faults.quarantine import record_node_fault
from train.inputs import Inputs
from train.monitor.alerts import STRAGGLER, Alerts
from train.monitor.metrics import Metrics
from train.monitor.plots import plot_curves, plot_grid
from train.monitor.run_log import read_metrics
from train.monitor.stragglers import Place
from train.monitor.tracker import SAMPLE_GRID, Tracker

if TYPE_CHECKING:  # diffusers takes seconds to import
    from train.sampling.sampler import SamplingStep

# Decay of the exponential average that smooths the loss, a log line at a time.
SMOOTH = 0.98


class RunProgress:
    """Shows a run to its user; only rank 0 has one.  step: the step that the run resumes from."""

    def __init__(self, config: Config, inputs: Inputs, run_dir: Path, step: int, device: torch.device) -> None:
        self.config, self.run_dir = config, run_dir
        self.tracker = Tracker(config, run_dir, step, inputs.identity.selections)
        n, self.low_res = config.sample.prompts, None
        if size := config.model.low_res_size:
            stored = prompts_with_low_res(inputs.datasets, inputs.meta, n, size, config.data.images)
            prompts = [(caption, emb) for caption, emb, _ in stored]
            self.low_res = torch.from_numpy(np.stack([image for _, _, image in stored])).to(device).float() / 127.5 - 1
        else:
            prompts = inputs.prompts or stored_prompts(inputs.datasets, inputs.meta, n)
        self.captions = [caption for caption, _ in prompts]
        self.text_emb = torch.stack([torch.from_numpy(emb) for _, emb in prompts]).to(device)
        self.empty = torch.from_numpy(read_empty(inputs.datasets[0].text, inputs.meta)).to(device)
        self.progress = Progress(run_dir.name, config.steps, "step", run_dir, start=step)
        self.alerts = Alerts(self._alert)
        self._sum = self._weight = 0.0
        self._shown: dict[str, str] = {}
        self._slowest: Place | None = None
        self._told_enlarged = False
        self._counted: set[str] = set()
        for line in self.tracker.lines:
            self._smooth(line["loss"])

    def log(self, step: int, values: dict[str, float], metrics: Metrics) -> None:
        """Log a line of metrics and show the most important ones beside the progress."""
        bad_counts, self._slowest = metrics.bad_counts, metrics.slowest
        values = values | {"loss_smoothed": self._smooth(values["loss"])}
        where: dict[str, float | str] = {}
        if self._slowest:
            where = {"straggler_node": self._slowest.node, "straggler_gpu": self._slowest.gpu}
        self.tracker.log(step, {**values, **where})
        self.alerts.check(step, values, self._slowest)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "lr": f"{values['lr']:.2e}",
            "img/s": f"{values['images_per_second']:.1f}",
            "data": f"{values['data_wait_share']:.0%}",
        }
        if "validation/mse" in values:  # shown until the next one
            self._shown = {"val mse": f"{values['validation/mse']:.4f}"}
        shown |= self._shown | ({"bad": str(sum(bad_counts.values()))} if bad_counts else {})
        self.progress.update(step - self.progress.done, shown)
        if bad_counts and values["bad_samples"]:
            self.progress.write(
                f"step {step}: {values['bad_samples']:.0f} samples skipped on all ranks; "
                f"on rank 0 since the start: {bad_counts}; listed in {self.run_dir / 'quarantine'}"
            )
        if values["enlarged_samples"] and not self._told_enlarged:
            size, self._told_enlarged = self.config.model.image_size, True
            self.progress.write(
                f"step {step}: {values['enlarged_samples']:.0f} of {values['samples']:.0f} pictures are smaller than "
                f"model.image_size={size}, and the net learns their blur: data.where='min(width, height) >= {size}' "
                "leaves such out; further ones are counted in enlarged_samples"
            )

    def draw_samples(self, step: int, unet: UNet, after_step: Callable[["SamplingStep"], object]) -> None:
        """Draw the grid of a step: the same prompts and seeds each time, a row for each guidance scale.

        In the second stage the first row shows the images that are enlarged, which are of the data, as bilinear
        interpolation enlarges them.
        after_step: called with each denoising step of a row.
        """
        # Imported here: diffusers takes seconds, for which all ranks would wait at each start.
        from train.sampling.sampler import make_scheduler, sample, to_pixels

        c, n = self.config, len(self.captions)
        scales = c.sample.guidance_scales
        scheduler = make_scheduler(c.diffusion_steps, c.model.learn_sigma, second_stage=c.model.low_res_size > 0)
        seeds = [c.seed + i for i in range(n)]
        rows: list[Tensor] = [
            sample(unet, scheduler, self.text_emb, self.empty, scale, c.sample.steps, seeds, after_step, self.low_res)
            for scale in scales
        ]
        beside = [f"guidance {scale:g}" for scale in scales]
        if self.low_res is not None:
            rows.insert(0, to_pixels(enlarge(self.low_res, c.model.image_size)))
            beside.insert(0, "small image")
        path = self.run_dir / "samples" / f"step-{step:08d}.png"
        title = f"step {step}, {c.sample.steps} sampler steps, EMA {c.ema_decay:g}"
        # With one scale the label stands beside the first of several rows, which are all of that scale.
        columns = n if len(rows) > 1 else 8
        plot_grid(torch.cat(rows).numpy(), self.captions * len(rows), title, path, columns, beside)
        self.tracker.image(step, SAMPLE_GRID, path)

    def _smooth(self, loss: float) -> float:
        """Add a loss to the exponential average, unless it is not finite; returns the average, without initial bias."""
        if math.isfinite(loss):
            self._sum = SMOOTH * self._sum + (1 - SMOOTH) * loss
            self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        return self._sum / self._weight if self._weight else loss

    def _alert(self, title: str, text: str) -> None:
        self.progress.write(f"ALERT {title}: {text}", sys.stderr)
        self.tracker.alert(title, text)
        # Once a start: two nodes that are slow in turns would soon have too many faults.
        if title.startswith(STRAGGLER) and self._slowest and self._slowest.node not in self._counted:
            self._counted.add(self._slowest.node)
            record_node_fault(self.run_dir, self._slowest.node, STRAGGLER, f"GPU {self._slowest.gpu}, {text}")

    def close(self, step: int, done: bool) -> None:
        """Draw the curves and print where the files are.

        step: the last that was made.  done: whether all steps are made, which is marked.
        """
        self.alerts.close()
        self.progress.update(step - self.progress.done)
        self.progress.close()
        curves = plot_curves(read_metrics(self.tracker.path), self.run_dir)
        self.tracker.close()
        print(f"curves      {curves[0]}  {curves[1]}  ({self.tracker.path})")
        for path in sorted((self.run_dir / "samples").glob("*.png"))[-1:]:
            print(f"samples     {path}")
        if latest := latest_checkpoint(self.run_dir):
            print(f"checkpoint  {latest}")
        if done:
            mark_done(self.run_dir, self.config.steps)
