"""What train.export writes, through diffusers' own loaders; and the way back, train.weights.pretrained."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5EncoderModel

from data.text.encoder import TextEncoder
from data.tiny_t5 import TinyT5, write_tiny_t5
from model.config import UNetConfig
from model.convert import diffusers_config
from model.unet import UNet
from tests.checkpoints import changed_run, write_manifest, write_run
from train.checkpoint.checkpoint import Checkpoint
from train.export import Export, export, main
from train.sampling.sampler import make_scheduler, sample
from train.weights.pretrained import load_pretrained

NET = UNetConfig(
    image_size=16, model_channels=64, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[8],
    norm_groups=16, num_head_channels=32, encoder_dim=48, encoder_channels=64, att_pool_heads=4,
    activation="gelu_3bit",
)  # fmt: skip
EPS_ALONE = replace(NET, out_channels=3)
TIMESTEPS = 250


def write_meta(encoder: Path, text: Path, compute: str = "bfloat16", tokens: int = 77) -> Path:
    text.mkdir()
    TextEncoder(str(encoder), tokens, compute, torch.device("cpu")).meta("float16").write(text)
    return text


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny T5, the meta file of a training's embeddings, two runs, and both exported."""
    base = tmp_path_factory.mktemp("export")
    write_tiny_t5(TinyT5(out=str(base / "t5"), dim=NET.encoder_dim))
    write_meta(base / "t5", base / "text")
    for name, config in (("run", NET), ("eps", EPS_ALONE)):
        write_run(base / name, config, base / "text", diffusion_steps=TIMESTEPS)
        export(Export(str(base / name), str(base / f"{name}-if"), encoder=str(base / "t5")))
    export(Export(str(base / "run"), str(base / "no-text-if"), weights="master", dtype="bfloat16"))
    return base


def trained(base: Path, name: str, weights: str = "ema") -> UNet:
    unet = UNet(EPS_ALONE if name == "eps" else NET).requires_grad_(False)
    unet.load_state_dict(Checkpoint.open(base / name).weights(weights), strict=True)
    return unet


def load(folder: Path, **options: object) -> IFPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    assert isinstance(pipeline, IFPipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["run", "eps"])
def test_the_exported_net_is_ours(base, name):
    ours, theirs = trained(base, name), UNet2DConditionModel.from_pretrained(base / f"{name}-if" / "unet")
    torch.manual_seed(3)
    x, t, text = torch.randn(2, 3, 16, 16), torch.tensor([3, 240]), torch.randn(2, 77, NET.encoder_dim)
    out, expected = theirs(x, t, text).sample, ours(x, t, text)
    assert expected.std() > 0.1
    assert (out[:, : expected.shape[1]] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not out[:, expected.shape[1] :].any(), "what IFPipeline splits off and throws away"


@pytest.mark.parametrize(("name", "variance"), [("run", "learned_range"), ("eps", "fixed_small")])
def test_the_scheduler_is_true_of_the_training(base, name, variance):
    config = load(base / f"{name}-if", text_encoder=None).scheduler.config
    assert config.variance_type == variance and config.num_train_timesteps == TIMESTEPS
    assert (config.beta_schedule, config.prediction_type) == ("squaredcos_cap_v2", "epsilon")
    assert (config.thresholding, config.dynamic_thresholding_ratio, config.sample_max_value) == (True, 0.95, 1.5)


@pytest.mark.parametrize("name", ["run", "eps"])
def test_a_prompt_gives_the_picture_of_train_sample(base, name):
    prompts, seed, steps, guidance = ["a cat", "Two red circles "], 5, 4, 3.0
    encoder = TextEncoder(str(base / "t5"), 77, "bfloat16", torch.device("cpu"))
    encoder.model.float()
    text_emb, empty = torch.from_numpy(encoder(prompts)), torch.from_numpy(encoder([""]))[0]
    scheduler = make_scheduler(TIMESTEPS, name == "run")
    expected = sample(trained(base, name), scheduler, text_emb, empty, guidance, steps, [seed, seed + 1])

    pipeline = load(base / f"{name}-if")
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}

    def pictures(**conditions: object) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        images = pipeline(**conditions, **options, generator=generators).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 255

    by_prompt = pictures(prompt=prompts)
    assert expected.float().std() > 10
    assert (by_prompt - expected).abs().max() < 1
    by_embedding = pictures(prompt_embeds=text_emb, negative_prompt_embeds=empty.expand_as(text_emb))
    assert (by_embedding - expected).abs().max() < 1
    options["guidance_scale"] = 1.0
    assert pictures(prompt_embeds=text_emb).std() > 10


def test_without_an_encoder_it_samples_from_embeddings(base):
    pipeline = load(base / "no-text-if", dtype=torch.bfloat16)
    assert pipeline.text_encoder is None and pipeline.tokenizer is None
    expected = {name: value.bfloat16() for name, value in trained(base, "run", "master").state_dict().items()}
    assert same(load_pretrained(base / "no-text-if", NET), expected), "the masters, rounded"
    text_emb = torch.randn(1, 77, NET.encoder_dim, dtype=torch.bfloat16)
    (image,) = pipeline(prompt_embeds=text_emb, negative_prompt_embeds=text_emb, num_inference_steps=2).images
    assert image.size == (16, 16)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_half_a_net_and_its_encoder_load_in_one_dtype(base, tmp_path, options):
    export(Export(str(base / "run"), str(tmp_path / "if"), dtype="bfloat16", encoder=str(base / "t5")))
    assert len(load(tmp_path / "if", **options)("a cat", num_inference_steps=2).images) == 1


def test_the_real_tokenizer_comes_along(base, shared, tmp_path):
    """Its vocabulary, and IF's 77 tokens, which are not its own default."""
    T5EncoderModel(
        T5Config(vocab_size=32128, d_model=NET.encoder_dim, d_kv=8, d_ff=16, num_heads=2, num_layers=1)
    ).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(shared / "t5_tokenizer").save_pretrained(tmp_path / "t5")
    run = write_run(tmp_path / "run", NET, write_meta(tmp_path / "t5", tmp_path / "text", "float32"))
    export(Export(str(run), str(tmp_path / "if"), encoder="auto"))
    pipeline = load(tmp_path / "if")
    assert pipeline.tokenizer("a photo of a cat").input_ids == [3, 9, 1202, 13, 3, 9, 1712, 1]
    caption = "a photo of a cat " * 30
    states, negative = pipeline.encode_prompt([caption])
    assert states.shape == negative.shape == (1, 77, NET.encoder_dim)
    expected = TextEncoder(str(tmp_path / "t5"), 77, "float32", torch.device("cpu"))([caption, ""])
    assert torch.allclose(torch.cat([states, negative]), torch.from_numpy(expected), atol=1e-6)


def test_the_folder_is_whole_readable_and_tells_no_paths(base):
    folder = base / "run-if"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"run-if", "unet", "scheduler", "text_encoder", "tokenizer"}
    assert {path.stat().st_mode for path in files} == {(folder / "model_index.json").stat().st_mode}
    assert not [path for path in files if path.suffix == ".json" and str(base) in path.read_text()]
    assert not list(base.glob("*.part"))


def test_large_nets_are_cut_into_shards(base, tmp_path):
    export(Export(str(base / "run"), str(tmp_path / "if")), shard_size="2MB")
    sizes = [path.stat().st_size for path in (tmp_path / "if" / "unet").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 2.2e6
    assert same(load_pretrained(tmp_path / "if", NET), trained(base, "run").state_dict())
    assert same(load(tmp_path / "if").unet.state_dict(), load(base / "run-if").unet.state_dict())


@pytest.mark.parametrize("name", ["run", "eps"])
def test_the_way_back_is_exact(base, name):
    unet = trained(base, name)
    folder = base / f"{name}-if"
    for path in (folder, folder / "unet", folder / "unet" / "diffusion_pytorch_model.safetensors", base / name,
                 base / name / "checkpoints" / "step-00000007"):  # fmt: skip
        state = load_pretrained(path, unet.config)
        assert same(state, unet.state_dict()), path
        unet.load_state_dict(state, strict=True)


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_a_file_under_the_released_names(base, tmp_path, suffix):
    state, path = trained(base, "run").state_dict(), tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    assert same(load_pretrained(path, NET), state)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", ["10GB", "2MB"])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
def test_what_diffusers_saves_is_read(base, tmp_path, variant, shard_size, safe):
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    unet = UNet2DConditionModel.from_pretrained(base / "run-if" / "unet", dtype=dtype)
    unet.save_pretrained(tmp_path / "unet", max_shard_size=shard_size, variant=variant, safe_serialization=safe)
    state = load_pretrained(tmp_path, NET)
    assert same(state, {name: value.to(dtype) for name, value in trained(base, "run").state_dict().items()})
    assert (len(list((tmp_path / "unet").iterdir())) > 3) == (shard_size == "2MB")


def test_of_several_copies_the_fullest_precision_is_read(base, tmp_path):
    shutil.copytree(base / "run-if" / "unet", tmp_path / "unet")
    for variant, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = UNet2DConditionModel.from_pretrained(base / "run-if" / "unet", dtype=dtype)
        half.save_pretrained(tmp_path / "unet", variant=variant)
    assert load_pretrained(tmp_path, NET)["out.2.bias"].dtype == torch.float32
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_pretrained(tmp_path, NET)["out.2.bias"].dtype == torch.float16


@pytest.fixture
def torn(base, tmp_path) -> Path:
    """A run whose two newest checkpoints are damaged: a byte of one is another, a file of the other is cut."""
    for step in (3, 7, 12, 15):
        shutil.copytree(base / "run" / "checkpoints" / "step-00000007", tmp_path / "checkpoints" / f"step-{step:08d}")
    newest = tmp_path / "checkpoints" / "step-00000015" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\1")
    (tmp_path / "checkpoints" / "step-00000012" / "rank-00001.safetensors").write_bytes(b"half")
    return tmp_path


def test_of_a_run_the_latest_whole_checkpoint_is_meant_and_newer_ones_are_named(torn, base, capsys):
    assert Checkpoint.open(torn).folder.name == "step-00000007"
    passed_over = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(passed_over) == 2 and all(line.endswith("'step-00000007' before it is taken.") for line in passed_over)
    assert "step-00000015': the contents of rank-00000.safetensors are not those" in passed_over[0]
    assert "step-00000012': rank-00001.safetensors has 4 bytes, not " in passed_over[1]
    assert same(load_pretrained(torn, NET), trained(base, "run").state_dict())
    assert capsys.readouterr().err.count("DAMAGED CHECKPOINT") == 2
    export(Export(str(torn), str(torn / "if")))
    assert capsys.readouterr().err.count("DAMAGED CHECKPOINT") == 2
    assert Checkpoint.open(torn / "checkpoints" / "step-00000003").folder.name == "step-00000003"
    assert not capsys.readouterr().err and (torn / "checkpoints" / "step-00000015").exists(), "nothing is renamed"


@pytest.mark.parametrize("step", [12, 15])
def test_a_damaged_step_that_is_named_itself_is_refused(torn, step):
    folder = torn / "checkpoints" / f"step-{step:08d}"
    for read in (lambda: export(Export(str(folder), str(torn / "if"))), lambda: load_pretrained(folder, NET)):
        with pytest.raises(
            ValueError, match=r"is not a whole checkpoint \(.*rank-0000.*\): name another step-NNNNNNNN"
        ):
            read()


def refused(message: str, path: Path, config: UNetConfig = NET) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(path, config)
    assert str(path) in str(caught.value)


def test_weights_that_do_not_fit_are_named(base, tmp_path):
    state = trained(base, "run").state_dict()
    del state["time_embed.0.weight"]
    state |= {"extra.weight": torch.zeros(1), "out.2.bias": torch.zeros(7)}
    save_file(state, tmp_path / "ours.safetensors")
    refused(
        r"1 missing \(time_embed\.0\.weight\); 1 unexpected \(extra\.weight\); "
        r"1 of another shape \(out\.2\.bias is \[7\], the net's \[6\]\): set model",
        tmp_path / "ours.safetensors",
    )
    state = load_file(base / "run-if" / "unet" / "diffusion_pytorch_model.safetensors")
    del state["mid_block.attentions.0.to_k.bias"]
    save_file(state, tmp_path / "theirs.safetensors")
    refused(r"1 missing \(mid_block\.attentions\.0\.to_k\.bias\)", tmp_path / "theirs.safetensors")
    wider = replace(NET, num_res_blocks=2, model_channels=128)
    refused(r"missing \(down_.*time_embedding\.linear_1\.weight is \[128, 64\], the net's", base / "run-if", wider)
    refused(r"time_embed\.0\.weight is \[128, 64\], the net's \[256, 128\]", base / "run", wider)
    refused(r"conv_out\.weight is \[6,.*the net's \[3,", base / "run-if", EPS_ALONE)
    refused(r"conv_out\.weight is \[6,.*the net's \[2,", base / "eps-if", replace(NET, in_channels=1, out_channels=2))
    for path in (base / "run-if", base / "run-if" / "unet", base / "run"):
        refused(r"model\.norm_groups=16, this one has 8:.*set model\.norm_groups=16", path, replace(NET, norm_groups=8))
        refused(r"model\.num_head_channels=32, this one has 16", path, replace(NET, num_head_channels=16))
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refused(r"1 unexpected \(weight\)", tmp_path / "foreign.safetensors")


class Evil:
    def __reduce__(self) -> tuple:
        return (Path("done_by_a_pickle").touch, ())


def test_what_is_no_weights_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (base / "run-if" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.bin").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"out.2.bias": Evil()}, protocol=2))
    for name in ("cut.safetensors", "cut.bin", "evil.pt"):
        refused("cannot be read as weights", tmp_path / name)
    assert not (tmp_path / "done_by_a_pickle").exists()
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "nested.pt")
    refused("first entry that is no tensor: 'epoch'", tmp_path / "nested.pt")
    refused("no weights at", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no unet/ with one, and no checkpoint", tmp_path / "empty")
    (tmp_path / "index.json").write_text("{}")
    refused("not an index of shards", tmp_path / "index.json")
    index = tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(ValueError, match=r"2 of them are not beside it \(one\.safetensors, two\.safetensors\)"):
        load_pretrained(tmp_path / "sharded", NET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("checkpoint=nowhere", "/nowhere' has no whole checkpoint: name the folder of a run"),
        ("checkpoint=run out=run-if", "/run-if exists already: choose another out="),
        ("checkpoint=run out=t5/config.json/if", "could not be written (Not a directory)"),
        ("checkpoint=run ema_length=0.1", "tracked no power-function averages (ema_snapshot_every=0)"),
        ("checkpoint=run weights=best", "weights=best must be one of ema, master"),
        ("checkpoint=run weights=mater", "(did you mean 'master'?)"),
        ("checkpoint=run dtype=fp16", "dtype=fp16 must be one of float32, float16, bfloat16"),
        ("checkpoint=damaged/checkpoints/step-00000007", "is not a whole checkpoint"),
        ("checkpoint=damaged", "/damaged' has no whole checkpoint"),
        ("checkpoint=foreign/checkpoints/step-00000007", "is not one of this version"),
        (
            "checkpoint=torn/checkpoints/step-00000007",
            "manifest.json' is missing or damaged (its checksum does not fit)",
        ),
        ("checkpoint=wide", "channel_mult=[2, 4]: diffusers' UNet must begin with 1"),
        ("checkpoint=run encoder=text", "the encoder 'text' cannot be loaded"),
        ("checkpoint=of-bert encoder=auto", "is a BertModel, IFPipeline takes a T5 alone"),
        ("checkpoint=run encoder=narrow", "'narrow' is 32 wide, the embeddings of"),
        ("checkpoint=run encoder=other", "'other' is another encoder than the one that"),
        ("checkpoint=short encoder=t5", "pads prompts to 77 tokens, this net was trained with 32"),
        ("checkpoint=huge dtype=float16", "is not finite in torch.float16: choose another dtype"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(base, foreign, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(base)
    before = set(base.iterdir())
    with pytest.raises(SystemExit) as caught:
        main([*([] if "out=" in arguments else ["out=new-if"]), *arguments.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert set(base.iterdir()) == before


@pytest.fixture(scope="module")
def foreign(base) -> None:
    """Encoders and runs that an export must refuse."""
    BertModel(
        BertConfig(vocab_size=400, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(base / "bert")
    AutoTokenizer.from_pretrained(base / "t5").save_pretrained(base / "bert")
    write_tiny_t5(TinyT5(out=str(base / "narrow"), dim=32))
    write_tiny_t5(TinyT5(out=str(base / "other"), dim=48, seed=1))
    write_run(base / "short", NET, write_meta(base / "t5", base / "text-32", tokens=32))
    write_run(base / "of-bert", NET, write_meta(base / "bert", base / "text-bert"))
    write_run(base / "wide", replace(NET, channel_mult=[2, 4]), base / "text")
    (changed_run(base / "run", base / "damaged") / "rank-00001.safetensors").write_bytes(b"half")
    changed_run(base / "run", base / "foreign", lambda manifest: manifest["config"]["model"].update(depth=3))
    path = changed_run(base / "run", base / "torn") / "manifest.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    folder = changed_run(base / "run", base / "huge")
    weights = load_file(folder / "rank-00000.safetensors")
    weights["ema"][0] = 1e6
    save_file(weights, folder / "rank-00000.safetensors")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))


def test_the_released_sizes_can_be_expressed():
    for channels in (192, 320, 704):
        with torch.device("meta"):
            config = UNetConfig(model_channels=channels, encoder_dim=4096, encoder_channels=4 * channels)
            theirs, ours = UNet2DConditionModel(**diffusers_config(config)), UNet(config)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
