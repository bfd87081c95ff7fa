"""Evaluations of the second stage: of true and of drawn small images, by level of noise, beside interpolation."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from data import demo
from data.embed import Embed, embed
from data.storage.shards import find_shards
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from tests.checkpoints import random_net, write_run
from train.evaluate import Evaluate, check, evaluate
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.drawing import SEED_STRIDE
from train.evaluation.eval_set import EvalSet
from train.evaluation.evaluated_net import find_net, open_nets
from train.evaluation.manifest import MANIFEST
from train.evaluation.scores import psnr
from train.monitor import plots
from train.sampling.sampler import make_scheduler, sample

SIZE, SMALL, SAMPLES = 24, 16, 3
FIRST = UNetConfig(
    image_size=SMALL, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[8], num_head_channels=32, encoder_dim=64, encoder_channels=32, att_pool_heads=2,
)  # fmt: skip
NET = replace(FIRST, image_size=SIZE, low_res_size=SMALL, attention_resolutions=[12], scale_skip_connection=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("judge")
    demo.main([f"out={base / 'shards'}", "samples=6", "shard_size=3"])
    write_tiny_t5(TinyT5(out=str(base / "t5")))
    embed(Embed(str(base / "shards"), str(base / "text"), str(base / "t5"), 16, "float32", "float32"))
    write_run(base / "first", FIRST, base / "text")
    write_run(base / "second", NET, base / "text")
    return base


def arguments(base: Path, run: str, out: Path, **more: object) -> Evaluate:
    given = {"samples": SAMPLES, "guidance_scales": [2.0], "steps": "2", "micro_batch": 2, "seed": 1} | more
    return Evaluate(str(base / run), str(base / "shards"), str(base / "text"), str(out), **given)


def eval_set(base: Path) -> EvalSet:
    found, meta = find_shards(base / "shards"), TextMeta.read(base / "text")
    return EvalSet(found, SAMPLES, 1, text=str(base / "text"), meta=meta)


def images(folder: Path) -> np.ndarray:
    return ChunkedArray(folder, "images", SAMPLES).read()


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """By Pillow itself."""
    made = [Image.fromarray(p.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in made])


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    errors = [float(np.mean((x.astype(float) - y) ** 2)) for x, y in zip(a, b, strict=True)]
    return float(np.mean([20 * np.log10(255) - 10 * np.log10(error) for error in errors]))


def drawn_by_hand(base: Path, low_res: np.ndarray, level: float) -> np.ndarray:
    """The first micro batch of an evaluation."""
    chosen, scheduler = eval_set(base), make_scheduler(1000, True, second_stage=True)
    text, empty = torch.from_numpy(chosen.embeddings(0, 2)), torch.from_numpy(chosen.empty.copy())
    small = torch.from_numpy(low_res[:2]) / 127.5 - 1
    seeds = [SEED_STRIDE, SEED_STRIDE + 1]
    return sample(random_net(NET, 2), scheduler, text, empty, 2, 2, seeds, low_res=small, aug_level=level).numpy()


def test_the_psnr_is_that_of_each_picture():
    a = np.full((3, 3, 4, 4), 100, np.uint8)
    b = a.copy()
    b[0] += 1  # mse 1
    b[1, 0] -= 3  # 9 in one of three channels
    np.testing.assert_allclose(psnr(a, b), [48.1308, 43.3596, 58.9226], atol=1e-4)


def test_true_small_images_are_enlarged_at_each_level_beside_interpolation(base, tmp_path, capsys):
    out = tmp_path / "out"
    scores = ["psnr", "consistency", "alignment"]
    lines = evaluate(arguments(base, "second", out, scores=scores, aug_levels=[0, 0.5]))
    settings = [{n: line[n] for n in ("enlarged_by", "guidance_scale", "aug_level") if n in line} for line in lines]
    assert settings == [
        {"enlarged_by": "bicubic"}, {"enlarged_by": "bilinear"},
        {"guidance_scale": 2.0, "aug_level": 0.0}, {"guidance_scale": 2.0, "aug_level": 0.5},
    ]  # fmt: skip
    true, small = (eval_set(base).pictures(0, SAMPLES, size) for size in (SIZE, SMALL))
    folders = [out / name for name in ("bicubic", "bilinear", "guidance-2-level-0", "guidance-2-level-0.5")]
    np.testing.assert_array_equal(images(folders[0]), resized(small, SIZE))
    as_given = torch.nn.functional.interpolate(
        torch.from_numpy(small).double(), SIZE, mode="bilinear", align_corners=True
    )
    assert np.abs(images(folders[1]) - as_given.numpy()).max() < 0.51
    for folder, level in zip(folders[2:], (0, 0.5), strict=True):
        np.testing.assert_array_equal(images(folder)[:2], drawn_by_hand(base, small, level))
    assert not np.array_equal(images(folders[2]), images(folders[3]))
    for folder, line in zip(folders, lines, strict=True):
        assert line["psnr"] == pytest.approx(decibels(images(folder), true))
        assert line["consistency"] == pytest.approx(decibels(resized(images(folder), SMALL), small))
        assert 0 <= line["alignment"] <= 1
    assert lines[0]["psnr"] > lines[1]["psnr"] > lines[2]["psnr"] + 5, "a random net draws noise"
    assert json.loads((out / MANIFEST).read_text())["drawing"]["low_res"] == "true"
    written = json.loads((out / "scores.json").read_text())["scores"]
    assert [line | {"manifest": w["manifest"]} for line, w in zip(lines, written, strict=True)] == written
    assert len({w["manifest"] for w in written}) == 4
    examples = Image.open(out / "examples.png")
    assert examples.height > 2 * Image.open(folders[0] / "grid.png").height, "six rows"
    told = capsys.readouterr().out
    assert "3 pictures of 24 px, enlarged from true ones of 16 px" in told and "enlarged_by bicubic  psnr " in told


def test_what_the_first_stage_drew_is_enlarged(base, tmp_path):
    evaluate(arguments(base, "first", tmp_path / "first", scores=["alignment"]))
    given = {"scores": ["consistency"], "low_res": str(tmp_path / "first" / "guidance-2")}
    lines = evaluate(arguments(base, "second", tmp_path / "both", **given))
    drawn = images(tmp_path / "first" / "guidance-2")
    np.testing.assert_array_equal(images(tmp_path / "both" / "bicubic"), resized(drawn, SIZE))
    both = images(tmp_path / "both" / "guidance-2-level-0.25")
    np.testing.assert_array_equal(both[:2], drawn_by_hand(base, drawn, 0.25))
    assert lines[2]["consistency"] == pytest.approx(decibels(resized(both, SMALL), drawn))
    manifest = json.loads((tmp_path / "both" / MANIFEST).read_text())
    assert manifest["drawing"]["low_res"] == hashlib.sha256(drawn.tobytes()).hexdigest()
    with pytest.raises(ValueError, match=r"holds another evaluation, of drawing.low_res=.* \(now true\)"):
        evaluate(arguments(base, "second", tmp_path / "both", scores=["consistency"]))
    refused = (
        ({"seed": 2}, "drawn for other captions: evaluate both stages with the same shards, caption, samples and seed"),
        ({"low_res": str(tmp_path / "both" / "bicubic")}, "the pictures have 24 px, and the net enlarges 16 px"),
        ({"low_res": str(tmp_path / "gone")}, "gone: no pictures of an evaluation"),
        ({"low_res": str(tmp_path / "first" / "gone")}, "gone: no pictures of an evaluation"),
        ({"samples": 4}, "holds 3 pictures, and samples=4: give samples=3"),
        ({"scores": ["psnr"]}, "scores=psnr compares with the true picture, and low_res= was drawn"),
    )
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            evaluate(arguments(base, "second", tmp_path / "new", **given | change))
    assert not (tmp_path / "new").exists() and not (tmp_path / "first" / "gone").exists()
    for damaged in ("{", "[]", '{"drawing": {}}'):
        (tmp_path / "first" / "evaluation.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"evaluation.json' is not the manifest of an evaluation .*: make that"):
            evaluate(arguments(base, "second", tmp_path / "new", **given))


def test_what_is_of_the_second_stage_is_refused_for_the_first(base, tmp_path):
    for given, named in (
        ({"scores": ["psnr"]}, "scores=psnr"),
        ({"scores": ["alignment", "consistency"]}, "scores=consistency"),
        ({"aug_levels": [0.25], "scores": ["alignment"]}, r"aug_levels=\[0.25\]"),
        ({"low_res": "a", "scores": ["alignment"]}, "low_res=a"),
    ):
        with pytest.raises(ValueError, match=f"^{named} is of the second stage, and the net of the first: leave"):
            evaluate(arguments(base, "first", tmp_path / "new", **given))
    for levels in ([1.0], [-0.1], [0.2, 0.2], [0.3, 0.3000001]):
        with pytest.raises(ValueError, match="must be numbers, each at least 0 and below 1, different in six digits"):
            check(arguments(base, "second", tmp_path / "new", scores=["psnr"], aug_levels=levels))
    assert not (tmp_path / "new").exists()


def test_scores_are_drawn_over_the_level_if_there_are_several(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    lines = [{"enlarged_by": "bicubic", "psnr": 25.0}]
    lines += [{"guidance_scale": g, "aug_level": a, "psnr": g + a} for a in (0.0, 0.25) for g in (1.0, 4.0)]
    plots.plot_scores(lines, "", tmp_path / "scores.png")
    plots.plot_scores(lines[:3], "", tmp_path / "scores.png")
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in f.axes[0].lines} for f in figures]
    legends = [[text.get_text() for text in f.axes[0].get_legend().get_texts()] for f in figures]
    assert legends == [["bicubic", "guidance 1", "guidance 4"], ["bicubic", "level 0"]]
    assert [[0.0, 4.0], [0.25, 4.25]] in drawn[0].values() and [[1.0, 1.0], [4.0, 4.0]] in drawn[1].values()
    assert [f.axes[0].get_xlabel() for f in figures] == ["noise level", "guidance scale"]


def test_released_weights_of_the_second_stage_are_read(repo, tmp_path):
    TextMeta("none", "0", "0", 4, 48, "float32", "float32", "none").write(tmp_path)
    config = UNetConfig(**OmegaConf.load(repo / "conf" / "model" / "scenes_ii.yaml"), encoder_dim=48)
    unet = random_net(config, 3)
    save_file(unet.state_dict(), tmp_path / "net.safetensors")
    (opened,) = open_nets(str(tmp_path / "net.safetensors"), "scenes_ii", [])
    found = find_net(opened, "scenes_ii", "ema", str(tmp_path))
    assert found.config == config and found.config.low_res_size == 16
    loaded = found.load(torch.device("cpu")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())


@pytest.mark.slow
def test_two_ranks_give_the_bytes_and_scores_of_one(repo, base, tmp_path):
    given = f"""checkpoint={base / "second"} shards={base / "shards"} text={base / "text"} samples={SAMPLES} steps=2
        scores=[psnr,consistency,kid_lite0] guidance_scales=[2] aug_levels=[0,0.5] micro_batch=2""".split()
    environment = os.environ | {"PYTHONPATH": str(repo)}
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, "-m", "train.evaluate", *given, f"out={tmp_path / str(ranks)}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.npy"))
    assert len(files) == 4 * 4 * 2 + 2, "pictures and three scores of each of four drawings, in two pieces"
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes() for file in files)
    of_one, of_two = (json.loads((tmp_path / out / "scores.json").read_text()) for out in ("1", "2"))
    assert of_one["scores"] == of_two["scores"] and of_one["manifest"] == of_two["manifest"]
