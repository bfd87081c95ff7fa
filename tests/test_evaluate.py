"""Evaluations of a small net on drawn scenes: by one process and by two ranks, interrupted, and refused."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from data import demo
from data.embed import Embed, embed
from data.storage.shards import find_shards
from data.storage.tars import read_shard, write_shard
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from tests.checkpoints import random_net, write_run
from train.checkpoint.identity import weights_digest
from train.evaluate import Evaluate, check, main
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import EvalSet, Pictures
from train.evaluation.features import Extractor
from train.evaluation.manifest import MANIFEST, check_same, name_of
from train.evaluation.references import read_references, write_references
from train.evaluation.scene_alignment import matches
from train.evaluation.scores import align
from train.export import Export, export
from train.neighbours import Neighbours, neighbours
from train.neighbours import main as find_neighbours
from train.sample import Sample
from train.sample import run as draw
from train.sampling.sampler import make_scheduler, sample
from train.weights.pretrained import load_pretrained

NET = UNetConfig(
    image_size=32, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[16],
    num_head_channels=32, encoder_dim=64, encoder_channels=64, att_pool_heads=4,
    activation="gelu_3bit",
)  # fmt: skip
SAMPLES = 20
ARGUMENTS = f"""
    scores=[kid_lite0,alignment] samples={SAMPLES} guidance_scales=[1,3] steps=3 micro_batch=4 seed=2
""".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("evaluate")
    demo.main([f"out={base / 'shards'}", "samples=40", "shard_size=16"])
    for name, seed in (("text", 0), ("other-text", 1)):
        write_tiny_t5(TinyT5(out=str(base / f"t5-{seed}"), seed=seed))
        embed(Embed(str(base / "shards"), str(base / name), str(base / f"t5-{seed}"), 16, "float32", "float32"))
    write_run(base / "run", NET, base / "text")
    return base


def eval_set(base: Path, samples: int = SAMPLES, seed: int = 2) -> EvalSet:
    return EvalSet(
        find_shards(base / "shards"), samples, seed, text=str(base / "text"), meta=TextMeta.read(base / "text")
    )


def command(repo: Path, base: Path, out: str, ranks: int = 1) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repo)}
    program = [sys.executable, "-m", "train.evaluate"]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        environment["PATH"] = f"{Path(launcher).parent}{os.pathsep}{os.environ['PATH']}"
        program = [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(port), "--module",
                   "train.evaluate"]  # fmt: skip
    program += ["checkpoint=run", "shards=shards", "text=text", f"out={out}", *ARGUMENTS]
    return subprocess.Popen(
        program, cwd=base, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def scores(base: Path, out: str) -> list[dict[str, float]]:
    return json.loads((base / out / "scores.json").read_text())["scores"]


@pytest.fixture(scope="module")
def one(repo, base) -> Path:
    """An evaluation by one process, killed on its way and run again."""
    first = command(repo, base, "one")
    drawn = base / "one" / "guidance-1"
    while len(list(drawn.glob("*.images.npy"))) < 2:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (base / "one" / "scores.json").exists()
    there = {path: path.stat().st_mtime_ns for path in drawn.glob("*.images.npy")}
    again = command(repo, base, "one")
    told, error = again.communicate(timeout=300)
    assert again.returncode == 0, error[-3000:]
    assert {path: path.stat().st_mtime_ns for path in there} == there, "what was drawn is not drawn again"
    assert "kid_lite0" in told and "scores.png" in told
    goes_on = rf"^guidance 1: {SAMPLES} of {SAMPLES} pictures \(100 %\), .*, (\d+) of them in .*, to one/guidance-1$"
    assert 0 < int(re.search(goes_on, error, re.M)[1]) < SAMPLES and "\r" not in error, error
    return base / "one"


def test_an_interrupted_evaluation_goes_on_to_the_same_scores(base, one):
    lines = scores(base, "one")
    assert [line["guidance_scale"] for line in lines] == [1, 3]
    names = {"manifest", "guidance_scale", "kid_lite0", "alignment", "alignment_exact", "alignment_chance"}
    for line in lines:
        assert set(line) == names and all(np.isfinite(v) for name, v in line.items() if name != "manifest")
    assert lines[0]["kid_lite0"] > 0.05, "noise is no picture"
    for name in ("scores.png", "guidance-1/grid.png", "guidance-3/grid.png"):
        assert Image.open(one / name).size[0] > 300
    assert not list(one.rglob("*.part"))
    images = [ChunkedArray(one / f"guidance-{scale}", "images", SAMPLES).read() for scale in (1, 3)]
    assert images[0].shape == (SAMPLES, 3, 32, 32) and images[0].std() > 10
    assert not np.array_equal(*images), "guidance makes a difference"


def test_two_ranks_give_the_bytes_and_scores_of_one_under_the_same_manifest(repo, base, one):
    done = command(repo, base, "two", ranks=2)
    told, error = done.communicate(timeout=300)
    assert done.returncode == 0, told[-2000:] + error[-3000:]
    assert told.count("runs on the CPU") == 1, "the first rank tells"
    assert len(list((base / "two" / "guidance-1").glob("*.images.npy"))) == SAMPLES // 4
    for scale in (1, 3):
        of_one, of_two = (
            ChunkedArray(base / out / f"guidance-{scale}", "images", SAMPLES).read() for out in ("one", "two")
        )
        np.testing.assert_array_equal(of_one, of_two)
        for file in (base / "one" / f"guidance-{scale}").glob("*.npy"):
            assert file.read_bytes() == (base / "two" / f"guidance-{scale}" / file.name).read_bytes()
    first, second = (json.loads((base / out / "scores.json").read_text()) for out in ("one", "two"))
    assert first["scores"] == second["scores"] and first["manifest"] == second["manifest"]
    assert all(f"manifest {line['manifest']}" in told for line in second["scores"])
    assert len({line["manifest"] for line in second["scores"]}) == 2, "of another guidance is another"


def test_the_manifest_tells_contents_and_not_places(base, one, tmp_path):
    written = json.loads((one / MANIFEST).read_text())
    digest = hashlib.sha256()
    for caption in eval_set(base).captions(0, SAMPLES):
        digest.update(len(caption).to_bytes(8, "little") + caption.encode())
    assert written["prompts"] == digest.hexdigest()
    assert written["weights"] == weights_digest(random_net(NET, 2).state_dict()), "of the average"
    assert written["packages"]["Pillow"] == PIL.__version__ and written["packages"]["torch"] == torch.__version__
    assert written["drawing"] == {
        "samples": SAMPLES, "seed": 2, "steps": "3", "scheduler": "ddpm", "micro_batch": 4, "diffusion_steps": 1000,
    }  # fmt: skip
    assert set(written["extractors"]) == {"lite0"} and str(base) not in json.dumps(written)
    # A pixel, a letter or the draw makes another hash.
    shutil.copytree(base / "shards", tmp_path / "shards")
    rows = [(key, dict(members)) for key, members in read_shard(tmp_path / "shards" / "00000.tar", {"jpg", "txt"})]
    edited = dict(rows[0][1], txt=rows[0][1]["txt"] + b".")
    write_shard(tmp_path / "shards" / "00000.tar", [(rows[0][0], edited), *rows[1:]])
    whole, other, fewer = (eval_set(base, 40), eval_set(base, 40), eval_set(base, 39))
    other.shards = find_shards(tmp_path / "shards")
    prompts, pictures = whole.contents()
    assert other.contents()[0] != prompts and other.contents()[1] == pictures
    assert fewer.contents()[0] != prompts and fewer.contents()[1] != pictures


def test_another_manifest_is_refused_by_what_differs(base, one, tmp_path):
    written = json.loads((one / MANIFEST).read_text())
    check_same(one, written)
    check_same(tmp_path, written)
    check_same(one, written | {"extractors": {"inception": "1" * 64}})  # more scores may be computed in the folder
    other = written | {"weights": "0" * 64, "packages": written["packages"] | {"Pillow": "1.0"}}
    other |= {"extractors": {"lite0": "2" * 64}}
    expected = (
        f"holds another evaluation, of weights={written['weights'][:12]} (now 000000000000), "
        f"extractors.lite0={written['extractors']['lite0'][:12]} (now 222222222222), "
        f"packages.Pillow={PIL.__version__} (now 1.0): choose another out="
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_same(one, other)
    with pytest.raises(ValueError, match=r"drawing.micro_batch=4 \(now 5\)"):
        check_same(one, written | {"drawing": written["drawing"] | {"micro_batch": 5}})
    assert name_of(written, {"guidance_scale": 1.0}) != name_of(other, {"guidance_scale": 1.0})


def test_prompts_and_pictures_belong_together(base):
    every = eval_set(base, samples=40)
    captions, embeddings = every.captions(0, 40), every.embeddings(0, 40)
    pictures = every.pictures(0, 40, 64)
    told = []
    for path in sorted((base / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            told += [tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")]
    assert captions == told, "all that there are, in the order of the shards"
    assert len(set(captions)) > 30 and embeddings.shape == (40, 16, 64)
    assert np.mean([matches(p.transpose(1, 2, 0), c) for p, c in zip(pictures, captions, strict=True)]) > 0.9
    part = eval_set(base)
    some = part.captions(0, SAMPLES)
    assert len(set(some) & set(captions)) == len(set(some)) and some != captions[:SAMPLES], "drawn from all shards"
    drawn = np.sort(np.random.default_rng(2).permutation(40)[:SAMPLES])
    assert some == [told[i] for i in drawn], "without replacement, by the seed: the same pictures for whoever asks"
    assert part.captions(7, 12) == some[7:12]
    np.testing.assert_array_equal(part.embeddings(7, 12), part.embeddings(0, SAMPLES)[7:12])
    np.testing.assert_array_equal(part.pictures(7, 12, 64), part.pictures(0, SAMPLES, 64)[7:12])
    assert eval_set(base, seed=3).captions(0, SAMPLES) != some
    scored = align(pictures, captions)
    assert scored["alignment"] > 0.95 and scored["alignment_exact"] > 0.9 and scored["alignment_chance"] < 0.6


def test_pieces_of_any_size_make_one_array(tmp_path):
    values = np.arange(30).reshape(10, 3)
    pieces = ChunkedArray(tmp_path, "x", 10)
    assert pieces.missing(4) == [(0, 4), (4, 8), (8, 10)]
    pieces.write(4, values[4:6])
    (tmp_path / "000006-000008.x.part").write_bytes(b"cut short")
    assert pieces.missing(3) == [(0, 3), (3, 4), (6, 9), (9, 10)]
    for first, stop in pieces.missing(3):
        pieces.write(first, values[first:stop])
    assert pieces.missing(3) == [] and np.array_equal(pieces.read(), values)
    assert np.array_equal(pieces.read(2, 7), values[2:7])
    (tmp_path / "000004-000006.x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"000004-000006\.x\.npy' cannot be read .*delete it and run this again"):
        pieces.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("samples=2048 scores=[fid]", "samples=2048 are too few for fid: the covariance of 2048 features needs "
         "samples=2049 or more"),
        ("samples=1280 scores=[fd_lite0]", "too few for fd_lite0"),
        ("scores=[lite_fid]", "scores=lite_fid must be one of fid, fd_lite0, kid_lite0, alignment"),
        ("samples=41", "samples=41: the shards hold 40 captioned pictures"),
        ("guidance_scales=[1,1.0000001]", "must be one or more numbers, each at least 0, different in six digits"),
        ("checkpoint=nowhere", "/nowhere' has no whole checkpoint"),
        ("text=other-text", "which is not the encoder that the net was trained with"),
        ("text=nowhere", "/nowhere' (no meta.json)"),
        ("steps=0", "steps=0 must lie between"),
        ("ema_length=0.1,0.3", "ema_length=0.3 must be above 0 and at most 0.28"),
        ("ema_length=0.1", "tracked no power-function averages"),
        ("model=if_i_m ema_length=0.1", "ema_length=0.1 is of a run, and model=if_i_m of released weights"),
        ("model=if_i_m checkpoint=nowhere", "/nowhere': name a file or folder"),
        ("model=if_i_q", "model=if_i_q must be one of if_i_l, if_i_m, if_i_xl, "),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_leave_nothing(base, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(base)
    before = set(base.iterdir())
    given = {a.split("=")[0] for a in arguments.split()}
    rest = ["checkpoint=run", "shards=shards", "text=text", "out=new", *ARGUMENTS]
    with pytest.raises(SystemExit) as caught:
        main([*(a for a in rest if a.split("=")[0] not in given), *arguments.split(), "--local_rank=0"])
    assert_one_line(caught, capsys, message)
    assert set(base.iterdir()) == before


def assert_one_line(caught, capsys, message: str) -> None:
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and message in error


def test_another_evaluation_in_the_folder_is_refused(base, one, monkeypatch, capsys):
    monkeypatch.chdir(base)
    given = [a for a in ARGUMENTS if not a.startswith(("seed=", "steps="))] + ["seed=3", "steps=4"]
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint=run", "shards=shards", "text=text", "out=one", *given])
    assert_one_line(
        caught, capsys, "'one' holds another evaluation, of drawing.seed=2 (now 3), drawing.steps=3 (now 4)"
    )


def test_references_of_another_kind_are_refused(base, tmp_path):
    extract = Extractor("lite0", 3, lambda images: images.mean((2, 3)), torch.device("cpu"), "1" * 64)
    chosen, hashed = eval_set(base), "2" * 64
    features = extract(torch.from_numpy(chosen.pictures(0, SAMPLES, 32)))
    path = tmp_path / "references.npz"
    write_references(path, features, extract, hashed, 32)
    np.testing.assert_array_equal(read_references(str(path), extract, SAMPLES, hashed, 32), features)
    with pytest.raises(ValueError, match="other pixels: 32, this evaluation has 64"):
        read_references(str(path), extract, SAMPLES, hashed, 64)
    with pytest.raises(ValueError, match="other numbers of pictures: 20, this evaluation has 21"):
        read_references(str(path), extract, 21, hashed, 32)
    with pytest.raises(ValueError, match="other pictures: 222222222222, this evaluation has 333333333333"):
        read_references(str(path), extract, SAMPLES, "3" * 64, 32)
    with pytest.raises(ValueError, match="other weights: 111111111111, this evaluation has 444444444444"):
        read_references(str(path), replace(extract, digest="4" * 64), SAMPLES, hashed, 32)
    inception = Extractor("inception", 2048, lambda images: images.mean((2, 3)), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"other features: lite0 \(3\), this evaluation has inception \(2048\)"):
        read_references(str(path), inception, SAMPLES, hashed, 32)
    with pytest.raises(ValueError, match="is another net"):
        inception(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="give a file that an evaluation wrote"):
        read_references(str(path), extract, SAMPLES, hashed, 32)


def test_a_picture_that_cannot_be_read_ends_the_evaluation(base, tmp_path):
    (tmp_path / "00000.tar").write_bytes((base / "shards" / "00000.tar").read_bytes()[:20000])
    (tmp_path / "00000_stats.json").write_bytes((base / "shards" / "00000_stats.json").read_bytes())
    cut = Pictures(find_shards(tmp_path), samples=16, seed=0)
    with pytest.raises(ValueError, match=r"cannot be used \(.*without it the score would be of other pictures"):
        cut.pictures(0, 16, 32)


def test_the_defaults_are_those_of_the_card():
    args = Evaluate(checkpoint="", shards="", text="", out="")
    assert (args.samples, args.scores) == (30_000, ["fid"])
    check(args)


def test_the_nearest_training_pictures_are_found(base, one, tmp_path, capsys):
    """Training pictures among the images have themselves for neighbours; what a random net drew is far from all."""
    training = Pictures(find_shards(base / "shards"), samples=40, seed=0)
    for i in range(3):
        Image.fromarray(training.pictures(5 * i, 5 * i + 1, 32)[0].transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    out = tmp_path / "grid.png"
    copied, within = neighbours(Neighbours(str(tmp_path), str(base / "shards"), str(out), nearest=2))
    np.testing.assert_allclose(copied[:, 0], 0, atol=1e-3)
    assert copied[:, 1].min() > 1 and within.min() > 1 and Image.open(out).size[0] > 300
    assert "100% of the images are nearer to one than 95 %" in capsys.readouterr().out
    drawn, _ = neighbours(Neighbours(str(one / "guidance-1"), str(base / "shards"), shown=2))
    assert (one / "guidance-1-neighbours.png").is_file(), "a plot that says what it is of, and is none of the pictures"
    assert drawn.shape == (SAMPLES, 4) and drawn[:, 0].min() > np.median(within)


@pytest.mark.slow
def test_each_length_of_the_average_is_evaluated_exported_and_sampled_from_its_own_weights(repo, base, tmp_path):
    write_run(tmp_path / "run", NET, base / "text", ema_snapshot_every=5)
    data = [f"checkpoint={tmp_path / 'run'}", f"shards={base / 'shards'}", f"text={base / 'text'}"]
    rest = ["scores=[alignment]", "samples=4", "steps=2", "guidance_scales=[1,3]", "ema_length=0.1,0.05"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    told = subprocess.run(
        [sys.executable, "-m", "train.evaluate", *data, f"out={tmp_path / 'lengths'}", *rest],
        cwd=repo, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told.count("runs on") == 1
    written = json.loads((tmp_path / "lengths" / "lengths.json").read_text())
    lines = written["scores"]
    assert written["step"] == 7 and Path(written["checkpoint"]).name == "step-00000007"
    assert [(line["ema_length"], line["guidance_scale"]) for line in lines] == [
        (0.1, 1),
        (0.1, 3),
        (0.05, 1),
        (0.05, 3),
    ]
    assert Image.open(tmp_path / "lengths" / "lengths.png").size[0] > 300 and "ema of length 0.05" in told
    for length, seed in ((0.05, 3), (0.1, 4)):
        manifest = json.loads((tmp_path / "lengths" / f"ema-length-{length}" / MANIFEST).read_text())
        assert manifest["weights"] == weights_digest(random_net(NET, seed).state_dict())
    export(Export(str(tmp_path / "run"), str(tmp_path / "export"), ema_length=0.1))
    exported, expected = load_pretrained(tmp_path / "export", NET), random_net(NET, 4).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in expected.items())
    card = (tmp_path / "export" / "README.md").read_text()
    assert "The moving average of the weights, of relative length 0.1" in card and "decay of the average" not in card
    np.save(tmp_path / "one.npy", np.zeros((16, 64), np.float32))
    given = {"embeddings": str(tmp_path / "one.npy"), "guidance_scale": 1.0, "steps": "2", "n": 1}
    folder = draw(Sample(str(tmp_path / "run"), ema_length=0.05, out=str(tmp_path / "samples"), **given))
    assert json.loads((folder / "sample.json").read_text())["ema_length"] == 0.05


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("images=shards", "holds 0 pictures of 0 sizes: give a folder that train.evaluate"),
        ("shards=nowhere", "nowhere"),
        ("nearest=40", "nearest=40 must be less than the 40 training pictures"),
        ("nearest=0", "nearest=0 must be at least 1"),
        ("of=41", "samples=41: the shards hold 40 captioned pictures"),
    ],
)
def test_mistaken_neighbours_end_in_one_line(base, one, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(base)
    given = ["images=one/guidance-1", "shards=shards", "out=new.png"]
    with pytest.raises(SystemExit) as caught:
        find_neighbours([a for a in given if a.split("=")[0] != argument.split("=")[0]] + [argument])
    assert_one_line(caught, capsys, message)
    assert not Path("new.png").exists()


def test_released_weights_are_judged_by_the_name_of_their_net(repo, base, tmp_path):
    """model= and a file stand in for a run: the pictures are those of the net itself."""
    net = UNetConfig(**OmegaConf.load(repo / "conf" / "model" / "scenes.yaml"), encoder_dim=48)
    unet = random_net(net, 3)
    save_file(unet.state_dict(), tmp_path / "net.safetensors")
    write_tiny_t5(TinyT5(out=str(tmp_path / "t5"), dim=net.encoder_dim))
    embed(Embed(str(base / "shards"), str(tmp_path / "text"), str(tmp_path / "t5"), 77, "float32", "float32"))
    program = [sys.executable, "-m", "train.evaluate", "model=scenes", f"checkpoint={tmp_path / 'net.safetensors'}",
               f"shards={base / 'shards'}", f"text={tmp_path / 'text'}", f"out={tmp_path / 'out'}", "samples=4",
               "scores=[alignment]", "guidance_scales=[2]", "steps=3"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repo)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = EvalSet(
        find_shards(base / "shards"), 4, 0, text=str(tmp_path / "text"), meta=TextMeta.read(tmp_path / "text")
    )
    text_emb, empty = torch.from_numpy(chosen.embeddings(0, 4)), torch.from_numpy(chosen.empty.copy())
    expected = sample(unet, make_scheduler(1000, True), text_emb, empty, 2, 3, range(4)).numpy()
    drawn = ChunkedArray(tmp_path / "out" / "guidance-2", "images", 4).read()
    # A random net makes more of a rounding than a trained one.
    assert drawn.std() > 10 and np.abs(drawn.astype(int) - expected).mean() < 0.05
