"""What the user sees of a run: the bar, the metrics, the sample grids and, at the end, where everything lies."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.loader.prompts import stored_prompts
from data.text.embeddings import read_empty
from model.unet import UNet
from train.checkpoint.format import latest_checkpoint
from train.config import Config
from train.inputs import Inputs
from train.monitor.alerts import Alerts
from train.monitor.plots import plot_curves, plot_grid
from train.monitor.run_log import read_metrics
from train.monitor.tracker import Tracker
from train.sampling.sampler import make_scheduler, sample

# Of log lines, over which the loss is smoothed.
SMOOTH = 0.98


class RunProgress:
    """Rank 0's side of a run that people look at."""

    def __init__(self, config: Config, inputs: Inputs, run_dir: Path, step: int, device: torch.device) -> None:
        self.config, self.run_dir = config, run_dir
        self.tracker = Tracker(config, run_dir, step)
        prompts = stored_prompts(inputs.datasets, inputs.meta, config.sample.prompts)
        self.captions = [caption for caption, _ in prompts]
        self.text_emb = torch.stack([torch.from_numpy(emb) for _, emb in prompts]).to(device)
        self.empty = torch.from_numpy(read_empty(inputs.datasets[0].text, inputs.meta)).to(device)
        self.bar = tqdm(total=config.steps, initial=step, unit="step", desc=run_dir.name, smoothing=0.05)
        self.alerts = Alerts(self._alert)
        self._smooth = self._weight = 0.0
        for line in self.tracker.kept:
            self._smoothed(line["loss"])

    def log(self, step: int, metrics: dict[str, float], bad: dict[str, int]) -> None:
        """A line of metrics: means since the last one."""
        metrics = metrics | {"loss_smoothed": self._smoothed(metrics["loss"])}
        self.tracker.log(step, metrics)
        self.alerts.line(step, metrics)
        self.bar.update(step - self.bar.n)
        shown = {
            "loss": f"{metrics['loss']:.4f}",
            "lr": f"{metrics['lr']:.2e}",
            "img/s": f"{metrics['images_per_second']:.1f}",
            "data": f"{metrics['data_wait_share']:.0%}",
        }
        self.bar.set_postfix(shown | ({"bad": sum(bad.values())} if bad else {}))
        if bad and metrics["bad_samples"]:
            self.bar.write(
                f"step {step}: {metrics['bad_samples']:.0f} samples skipped on all ranks; "
                f"on rank 0 since the start: {bad}; named in {self.run_dir / 'quarantine'}"
            )

    def samples(self, step: int, unet: UNet) -> None:
        """A grid for the fixed prompts and seeds, a row for each guidance scale."""
        c, n = self.config, len(self.captions)
        scales = c.sample.guidance_scales
        scheduler = make_scheduler(c.diffusion_steps, c.model.learn_sigma)
        seeds = [c.seed + i for i in range(n)]
        rows: list[Tensor] = [
            sample(unet, scheduler, self.text_emb, self.empty, scale, c.sample.steps, seeds) for scale in scales
        ]
        path = self.run_dir / "samples" / f"step-{step:08d}.png"
        listed = ", ".join(f"{scale:g}" for scale in scales)
        title = f"step {step}, guidance {listed} from above, {c.sample.steps} sampler steps, EMA {c.ema_decay:g}"
        plot_grid(torch.cat(rows).numpy(), self.captions * len(scales), title, path, n if len(scales) > 1 else 8)
        self.tracker.image(step, "samples", path)

    def _smoothed(self, loss: float) -> float:
        """The exponential average of the losses so far, without the bias of its start; what is not finite is let be."""
        if math.isfinite(loss):
            self._smooth = SMOOTH * self._smooth + (1 - SMOOTH) * loss
            self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        return self._smooth / self._weight if self._weight else loss

    def _alert(self, title: str, text: str) -> None:
        self.bar.write(f"ALERT {title}: {text}", file=sys.stderr)
        self.tracker.alert(title, text)

    def close(self) -> None:
        """Draw the curves and say where everything lies."""
        self.alerts.close()
        self.bar.close()
        curves = plot_curves(read_metrics(self.tracker.path), self.run_dir)
        self.tracker.close()
        print(f"curves      {curves[0]}  {curves[1]}  ({self.tracker.path})")
        for path in sorted((self.run_dir / "samples").glob("*.png"))[-1:]:
            print(f"samples     {path}")
        if latest := latest_checkpoint(self.run_dir):
            print(f"checkpoint  {latest}")
