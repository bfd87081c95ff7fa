"""LoRA on our net, in diffusers' pipeline and through the trainer; the data of a DreamBooth; what doesn't fit."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from data import demo
from data.embed import Embed, embed
from data.loader.cursor import ShardCursor
from data.storage.shards import find_shards
from data.text.embeddings import from_bytes
from data.text.meta import TextMeta
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.convert import lora_to_diffusers, merge_lora
from model.unet import UNet
from tests.checkpoints import changed_run, random_net, write_manifest, write_run
from tests.support.hub_server import Repo
from tests.test_evaluate import NET, assert_one_line
from train import dreambooth, export_lora
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.format import latest_checkpoint, step_folder
from train.config import Config, LoRAConfig
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import EvalSet
from train.export import Export, export
from train.monitor.step_memory import inputs, step_bytes, walk_bytes
from train.sampling.sampler import make_scheduler, sample
from train.summary import parameters
from train.weights.diffusers_folder import build_unet
from train.weights.lora import FILE, add_lora, merge_adapter, read_adapter
from train.weights.pretrained import net_weights
from train.weights.trained_net import load_net

LORA = LoRAConfig(rank=4, alpha=6.0)


def pipeline_of(weights: dict[str, torch.Tensor], config: UNetConfig = NET) -> IFPipeline:
    return IFPipeline(
        tokenizer=None, text_encoder=None, unet=build_unet(weights, config, torch.float32),
        scheduler=make_scheduler(1000, True), safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, 3, 32, 32), torch.tensor([3, 700]), torch.randn(2, 16, NET.encoder_dim)


@torch.no_grad()
def test_lora_on_our_net_is_the_same_lora_in_diffusers(tmp_path):
    unet = random_net(NET, 1)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = unet(*batch())
    add_lora(unet, LORA)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 4 and all(".lora_" in name for name in trained), (
        "A and B of three projections in four blocks"
    )
    torch.testing.assert_close(unet(*batch()), plain, msg="what is added changes nothing yet")
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.2)
    expected = unet(*batch())
    assert (expected - plain).std() > 0.1 * plain.std()

    lora = lora_to_diffusers({name.replace(".default.", "."): p.data for name, p in trained.items()}, NET)
    merged = merge_lora(weights, lora, LORA.alpha / LORA.rank, NET)
    ours = UNet(NET)
    ours.load_state_dict(merged)
    torch.testing.assert_close(ours(*batch()), expected, rtol=1e-4, atol=1e-5)

    pipeline = pipeline_of(weights)
    IFPipeline.save_lora_weights(
        tmp_path, lora,
        unet_lora_adapter_metadata={"r": LORA.rank, "lora_alpha": LORA.alpha,
                                    "target_modules": sorted({k.rsplit(".lora_", 1)[0] for k in lora})},
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipeline.unet(*batch()).sample, expected, rtol=1e-4, atol=1e-5)
    back = read_adapter(tmp_path)
    assert back.scale == 1.5 and all(torch.equal(back.lora[name], lora[name]) for name in lora)


def test_an_adapter_of_another_net_is_refused(tmp_path):
    wide = replace(NET, model_channels=64)
    unet = random_net(wide, 1)
    add_lora(unet, LORA)
    state = {n.replace(".default.", "."): p for n, p in unet.named_parameters() if p.requires_grad}
    lora = lora_to_diffusers(state, wide)
    small = random_net(NET, 2).state_dict()
    with pytest.raises(ValueError, match=r"of another net: it changes 'down_blocks.1.attentions.0.add_k_proj' of "
                                         r"\[128, 64\], and here that is \[64, 64\]"):  # fmt: skip
        merge_lora(small, lora, 1.0, NET)
    with pytest.raises(ValueError, match=r"'mid_block.nothing' of \[3, 3\], and here that is none"):
        merge_lora(small, {f"mid_block.nothing.lora_{x}.weight": torch.eye(3) for x in "AB"}, 1.0, NET)
    with pytest.raises(ValueError, match="A or B alone"):
        merge_lora(small, {"mid_block.attentions.0.to_q.lora_A.weight": torch.zeros(4, 64)}, 1.0, NET)
    with pytest.raises(ValueError, match="don't fit the config"):
        lora_to_diffusers({}, NET)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="holds no LoRA matrices"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="no adapter can be read at"):
        read_adapter(tmp_path / "nowhere")


def test_the_plan_counts_the_bytes_of_a_step_with_lora():
    unet = random_net(NET, 1)
    add_lora(unet, LORA)
    real = walk_bytes(unet, inputs(NET, 2, 16))
    planned = step_bytes(NET, 2, "fp32", accumulated=False, tokens=16, lora=LORA)
    assert planned == real
    assert planned.kept < 0.9 * step_bytes(NET, 2, "fp32", accumulated=False, tokens=16).kept
    config = Config(model=NET, lora=LORA, init_from="weights")
    added = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert parameters(config) == (added, sum(p.numel() for p in UNet(NET).parameters()))


def test_lora_needs_a_net_to_begin_from():
    with pytest.raises(ValueError, match=r"lora\.rank=4 adds to a trained net: name its weights in init_from"):
        Config(lora=LORA)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run to begin from, and the data of a DreamBooth made with it."""
    base = tmp_path_factory.mktemp("finetune")
    demo.main([f"out={base / 'shards'}", "samples=8", "shard_size=8"])
    write_tiny_t5(TinyT5(out=str(base / "t5")))
    embed(Embed(str(base / "shards"), str(base / "text"), str(base / "t5"), 16, "float32", "float32"))
    write_run(base / "run", NET, base / "text")
    (base / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(base / "pictures" / f"{i}.png")
    dreambooth.main([f"checkpoint={base / 'run'}", f"pictures={base / 'pictures'}", "prompt=a zwx toy",
                     "class_prompt=a toy", f"out={base / 'booth'}", "prior=6", "steps=2", "micro_batch=4"])  # fmt: skip
    return base


def train(repo: Path, base: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    model = [f"model.{name}={value}".replace(" ", "") for name, value in asdict(NET).items()]
    data = [f"data.mixture.{n}.{k}={base / 'booth' / n / k}" for n in ("concept", "prior") for k in ("shards", "text")]
    program = [
        sys.executable, str(repo / "train" / "main.py"), "+experiment=finetune_dreambooth", "model=small",
        *model, *data,
        f"init_from={base / 'run'}", f"run_dir={base / 'tuned'}", "steps=6", "save_every=3", "log_every=1",
        "precision=fp32", "optim.warmup_steps=2", "optim.lr_peak=1e-2", "sample.steps=2",
        "wandb.mode=disabled", *overrides,
    ]  # fmt: skip
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(program, cwd=base, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tuned(repo, base) -> Path:
    done = train(repo, base)
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "tuned"


def test_dreambooth_has_a_few_pictures_and_the_nets_own(base):
    for name, count in (("concept", 5), ("prior", 6)):
        shards = find_shards(base / "booth" / name / "shards")
        assert sum(shard.count for shard in shards) == count
        assert (base / "booth" / name / "text" / "empty.npy").exists()


def booth(base: Path, out: Path, **changed: str) -> list[list[tuple[bytes, bytes, np.ndarray]]]:
    """Caption, picture and embedding of each sample of both datasets, after train.dreambooth."""
    given = {
        "checkpoint": base / "run", "pictures": base / "pictures", "prompt": "a zwx toy", "class_prompt": "a toy",
        "prior": 6, "steps": 2, "micro_batch": 4, "out": out,
    } | changed  # fmt: skip
    dreambooth.main([f"{name}={value}" for name, value in given.items()])
    datasets = []
    for name in ("concept", "prior"):
        (shard,), meta = find_shards(out / name / "shards"), TextMeta.read(out / name / "text")
        cursor = ShardCursor(shard, str(out / name / "text"))
        samples = [cursor.read(row) for row in range(shard.count)]
        assert {sample.problem for sample in samples} == {""}
        datasets.append([(s.caption, s.image, from_bytes(s.embedding.read(), meta)) for s in samples])
    return datasets


def test_dreambooth_again_makes_anew_what_changed_and_nothing_else(base, tmp_path, capsys, monkeypatch):
    out = Path(shutil.copytree(base / "booth", tmp_path / "booth"))

    def again(**changed: str) -> tuple[list, str, bool]:
        """Both datasets, what was printed, and whether the pictures of the class were drawn."""
        before = (out / "prior" / "shards" / "00000.tar").stat().st_mtime_ns
        capsys.readouterr()
        found = booth(base, out, **changed)
        said = capsys.readouterr()
        return found, said.out + said.err, (out / "prior" / "shards" / "00000.tar").stat().st_mtime_ns != before

    (concept, prior), said, drawn = again()
    assert not drawn and "anew" not in said and "made again" not in said and "warning" not in said
    assert "\ndeepspeed train/main.py +experiment=finetune_dreambooth init_from=" in said
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["if-train dreambooth"])  # the installed command

    (other, _), said, drawn = again(prompt="a red ball")
    assert other[0][0] == b"a red ball" and not np.array_equal(other[0][2], concept[0][2]) and not drawn
    assert "1 shards were packed anew: 5 captions embedded, 0 kept" in said
    assert "\nif-train train +experiment=finetune_dreambooth init_from=" in said

    (back, other_prior), said, drawn = again(class_prompt="a ball")
    assert np.array_equal(back[0][2], concept[0][2]) and other_prior[0][0] == b"a ball" and drawn
    assert not np.array_equal(other_prior[0][2], prior[0][2])
    assert "the pictures of the class are drawn: those there were drawn with another prompts" in said

    (_, seeded), said, drawn = again(class_prompt="a ball", seed=3)
    assert drawn and "drawn with another seed" in said and seeded[0][1] != other_prior[0][1]
    assert "packed anew" not in said, "the captions are the same"
    assert again(class_prompt="a ball", seed=3, guidance_scale=1.0)[2]
    assert again(class_prompt="a ball", seed=3, guidance_scale=1.0, steps=3)[2]

    # A picture more; and another checkpoint, whose run had another cleaning.
    pictures = Path(shutil.copytree(base / "pictures", tmp_path / "pictures"))
    shutil.copy(pictures / "0.png", pictures / "9.png")
    (more, _), said, _ = again(pictures=pictures)
    assert len(more) == 6 and "1 captions embedded, 5 kept" in said
    run = tmp_path / "other"
    changed_run(base / "run", run, lambda manifest: manifest["text"].update(cleaning="lower-strip"))
    (cleaned, _), said, _ = again(checkpoint=run, prompt="a xyz123 toy")
    assert TextMeta.read(out / "concept" / "text").cleaning == "lower-strip" and "warning" not in said
    assert "were made with another cleaning: they are made again" in said
    assert not np.array_equal(cleaned[0][2], concept[0][2])


@pytest.mark.parametrize("word", ["xyz123", "@sks", "<new1>", "一只猫"])
def test_a_rare_word_that_the_cleaning_cuts_away_is_named(base, capsys, word):
    booth(base, base / "cut", prompt=f"a {word} toy")
    said = capsys.readouterr().err
    assert (
        f"warning: caption cleaning ('if-1') removes '{word}' from the prompt 'a {word} toy', and the net is given "
        "'a toy'" in said
    )
    assert said.count("warning: caption cleaning") == 1, "the prompt of the class has no such word"


@torch.no_grad()
def test_a_tuned_checkpoint_serves_here_and_in_diffusers(base, tuned, tmp_path, capsys):
    weights = Checkpoint.open(tuned).weights("master")
    assert all(".lora_" in name for name in weights) and len(weights) == 24, "the frozen net is not saved again"
    assert min(v.abs().max() for n, v in weights.items() if ".lora_B." in n) > 1e-4, "every matrix has been trained"
    ours = load_net(Checkpoint.open(tuned), "master", torch.device("cpu"))
    before = load_net(Checkpoint.open(base / "run"), "ema", torch.device("cpu"))
    expected = ours(*batch())
    assert (expected - before(*batch())).abs().max() > 1e-3

    export_lora.main([f"checkpoint={tuned}", f"out={tmp_path / 'lora'}", "weights=master"])
    pipeline = pipeline_of(before.state_dict())
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(pipeline.unet(*batch()).sample, expected, rtol=1e-4, atol=1e-5)
    merge_adapter(before, tmp_path / "lora")
    torch.testing.assert_close(before(*batch()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the adapter is of another net"):
        merge_adapter(random_net(replace(NET, model_channels=64), 1), tmp_path / "lora")
    for arguments, message in (
        ([f"checkpoint={base / 'run'}", f"out={tmp_path / 'none'}"], "is of a whole net, not of a LoRA"),
        ([f"checkpoint={tuned}", f"out={tmp_path / 'lora'}"], "exists already: choose another out="),
        ([f"checkpoint={tuned}", f"out={tmp_path / 'none'}", "weights=foo"], "weights=foo must be one of ema, master"),
        ([f"checkpoint={tuned}", f"out={tmp_path / 'none'}", "weights=masters"], "(did you mean 'master'?)"),
        ([f"checkpoint={tuned}", f"out={tmp_path / 'none'}", "ema_length=0.1"], "tracked no power-function averages"),
    ):
        with pytest.raises(SystemExit) as caught:
            export_lora.main(arguments)
        assert_one_line(caught, capsys, message)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # fails as a full disk does, while it writes
    try:
        with pytest.raises(OSError, match=r"none' could not be written .*: make space there, or choose another place"):
            export_lora.export_lora(export_lora.ExportLora(str(tuned), str(tmp_path / "none")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}

    export(Export(str(tuned), str(tmp_path / "if"), weights="master"))
    whole = UNet2DConditionModel.from_pretrained(tmp_path / "if" / "unet")
    torch.testing.assert_close(whole(*batch()).sample, expected, rtol=1e-4, atol=1e-5)


# Both in one process, for the imports take longer than the drawing.
DRAW_TWICE = """
import sys
from train.evaluate import main
base, adapter = sys.argv[1:]
rest = f"shards={base}/shards text={base}/text scores=[alignment] samples=4 guidance_scales=[2] steps=3".split()
main([f"checkpoint={base}/tuned", f"out={base}/of-run", "weights=master", *rest])
main([f"checkpoint={base}/run", f"adapter={adapter}", f"out={base}/of-adapter", *rest])
"""


def test_scores_are_of_the_tuned_net(repo, base, tuned, tmp_path):
    export_lora.main([f"checkpoint={tuned}", f"out={tmp_path / 'lora'}", "weights=master"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repo)}
    program = [sys.executable, "-c", DRAW_TWICE, str(base), str(tmp_path / "lora")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    of_run, of_adapter = (
        ChunkedArray(base / name / "guidance-2", "images", 4).read() for name in ("of-run", "of-adapter")
    )
    assert np.abs(of_run.astype(int) - of_adapter).max() <= 1
    unet = load_net(Checkpoint.open(base / "run"), "ema", torch.device("cpu"))
    chosen = EvalSet(find_shards(base / "shards"), 4, 0, str(base / "text"), TextMeta.read(base / "text"))
    text_emb, empty = torch.from_numpy(chosen.embeddings(0, 4)), torch.from_numpy(chosen.empty.copy())
    before = sample(unet, make_scheduler(1000, True), text_emb, empty, 2, 3, range(4))
    assert np.abs(before.numpy().astype(int) - of_run).max() > 5, "and not of the net before"


def test_tuning_goes_on_where_it_was(repo, base, tuned):
    told = (tuned / "metrics.jsonl").read_text()
    whole = load_file(latest_checkpoint(tuned) / "rank-00000.safetensors")
    for path in (latest_checkpoint(tuned), tuned / "done"):
        if path.is_dir():
            path.rename(path.with_name("aside"))
        else:
            path.unlink(missing_ok=True)
    done = train(repo, base)
    assert done.returncode == 0, done.stderr[-3000:]
    again = load_file(latest_checkpoint(tuned) / "rank-00000.safetensors")
    assert torch.equal(again["master"], whole["master"]) and torch.equal(again["ema"], whole["ema"])
    lines = [[json.loads(line)["loss"] for line in text.splitlines()]
             for text in (told, (tuned / "metrics.jsonl").read_text())]  # fmt: skip
    assert lines[0] == lines[1]


def test_a_lora_serves_no_other_weights_than_those_it_was_trained_on(repo, base, tuned, tmp_path, capsys):
    """The run that it began from trains on; later its newest checkpoint is damaged, and the earlier one is read."""
    folder = step_folder(base / "run", 8)
    shutil.copytree(step_folder(base / "run", 7), folder)
    try:
        weights = load_file(folder / "rank-00000.safetensors")
        weights["ema"][0] += 1
        save_file(weights, folder / "rank-00000.safetensors")
        write_manifest(folder, json.loads((folder / "manifest.json").read_text()) | {"step": 8})
        with pytest.raises(ValueError, match=r"run' has other weights than when the LoRA in '.*' was trained on them"):
            load_net(Checkpoint.open(tuned), "ema", torch.device("cpu"))
        shutil.copytree(tuned, tmp_path / "again")
        done = train(repo, base, f"run_dir={tmp_path / 'again'}", "steps=7")
        assert done.returncode == 2, done.stderr[-3000:]
        assert "trains a LoRA on other weights than those that init_from=" in done.stderr
        (folder / "rank-00000.safetensors").write_bytes(b"half")
        load_net(Checkpoint.open(tuned), "ema", torch.device("cpu"))
        assert f"DAMAGED CHECKPOINT '{folder}'" in capsys.readouterr().err
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_lora_on_weights_of_the_hub_goes_on_with_them_when_main_has_moved(repo, base, hub, tmp_path, monkeypatch):
    """A training in a process of its own, which resumes, and whose net is read without the hub."""
    for name, value in {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "60",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    weights = "unet/diffusion_pytorch_model.safetensors"
    save_file(random_net(NET, 7).state_dict(), tmp_path / "w.safetensors")
    files = {"unet/config.json": b"{}", weights: (tmp_path / "w.safetensors").read_bytes()}
    repository = hub.repos["org/net"] = Repo()
    first = repository.commit(files)
    given = ("init_from=org/net", f"run_dir={tmp_path / 'run'}")
    done = train(repo, base, *given, "steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    second = repository.commit(files | {weights: b"others"})
    done = train(repo, base, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumes from step 4" in done.stdout and "init_from" not in done.stdout.partition("resumes from")[2][:200]
    assert (
        f"main of org/net on the hub has moved to commit {second}; org/net@{first} is taken"
        in done.stdout + done.stderr
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert checkpoint.config["init_from"] == f"org/net@{first}" and checkpoint.step == 6
    merged, before = net_weights(checkpoint, "master"), random_net(NET, 7).state_dict()
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert changed and all("encoder_kv" in n or "qkv" in n or "proj_out" in n for n in changed)


@pytest.mark.slow
def test_another_rank_or_net_is_refused(repo, base, tuned):
    done = train(repo, base, "lora.rank=8")
    assert done.returncode == 2 and "was trained with lora=" in done.stderr
    done = train(repo, base, "model.model_channels=64", f"run_dir={base / 'other'}")
    assert done.returncode == 2 and "don't fit the net" in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checkpoint=nowhere", "/nowhere' has no whole checkpoint"),
        ("pictures=nowhere", "/nowhere': put the pictures of the concept there"),
        ("pictures=shards", "it holds shards already"),
        ("class_prompt=", "class_prompt= is empty"),
        ("class_prompt=none.txt", "class_prompt=none.txt holds no prompt: write one on each line"),
        ("prior=0", "prior=0 must be at least 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("steps=1001", "steps=1001 must lie between"),
    ],
)
def test_mistakes_end_in_one_line(base, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(base)
    Path("none.txt").write_text(" \n")
    given = ["checkpoint=run", "pictures=pictures", "prompt=a zwx", "class_prompt=a toy", "out=new", "steps=2"]
    with pytest.raises(SystemExit) as caught:
        dreambooth.main([a for a in given if a.split("=")[0] != argument.split("=")[0]] + [argument])
    assert_one_line(caught, capsys, message)
