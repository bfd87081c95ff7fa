"""Weights as wrappers, averages and trainers save them: the prefix is taken off and named, or the error names it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import UNetConfig
from model.convert import to_diffusers
from model.unet import UNet
from tests.checkpoints import random_net
from train.weights.pretrained import load_pretrained

NET = UNetConfig(
    image_size=16, model_channels=32, norm_groups=8, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[8],
    num_head_channels=32, encoder_dim=16, encoder_channels=32, att_pool_heads=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> UNet:
    return random_net(NET, 1)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def check_read(path: Path, expected: dict[str, Tensor], caplog, said: str) -> None:
    caplog.clear()
    state = load_pretrained(path, NET)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert len(caplog.messages) == bool(said), caplog.messages
    if said:
        assert caplog.messages[0] == f"{path}: {said}: taken off"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("names", ["released", "diffusers"])
@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "ema.", "ema_model.", "unet.", "model.diffusion_model.", "a.wrapper.of.mine."]
)
def test_the_common_prefix_is_taken_off_and_said(net, tmp_path, caplog, prefix, names, suffix):
    state = net.state_dict()
    given = under(prefix, to_diffusers(state, NET) if names == "diffusers" else state)
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({k: v.contiguous() for k, v in given.items()}, path)
    check_read(path, state, caplog, f"the prefix '{prefix}'")


def test_names_without_a_prefix_need_no_word(net, tmp_path, caplog):
    torch.save(net.state_dict(), tmp_path / "w.pt")
    check_read(tmp_path / "w.pt", net.state_dict(), caplog, "")


@pytest.mark.parametrize(
    "keys", [("state_dict",), ("model",), ("ema",), ("module",), ("state_dict", "model", "module")]
)
def test_nested_weights_are_found(net, tmp_path, caplog, keys):
    nested: dict = net.state_dict()
    for key in reversed(keys):
        nested = {key: nested}
    torch.save(nested | {"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "w.pt")
    check_read(tmp_path / "w.pt", net.state_dict(), caplog, f"the prefix '{'.'.join(keys)}.'")


def test_what_torch_itself_saves_is_read(net, tmp_path, caplog):
    state, path = net.state_dict(), tmp_path / "w.pt"
    compiled = torch.compile(net)
    torch.save(compiled.state_dict(), path)
    check_read(path, state, caplog, "'_orig_mod.' in the names")
    torch.save(nn.DataParallel(compiled).state_dict(), path)
    check_read(path, state, caplog, "'_orig_mod.' in the names and the prefix 'module.'")
    torch.save({re.sub(r"^(\w+\.0)\.", r"\1._orig_mod.", k): v for k, v in state.items()}, path)  # blocks alone
    check_read(path, state, caplog, "'_orig_mod.' in the names")
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), path)
    check_read(path, state, caplog, "the prefix 'module.' (1 others are left out: n_averaged)")
    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.zero_grad()
    net.requires_grad_(False)
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "step": torch.tensor(3)}, path)
    check_read(path, state, caplog, "the prefix 'model.' (1 others are left out: step)")


@pytest.mark.parametrize("names", [("model", "ema"), ("state_dict", "state_dict_ema"), ("online_model", "ema_model")])
def test_of_a_net_and_its_average_the_average_is_read(net, tmp_path, caplog, names):
    other, average = (under(f"{name}.", random_net(NET, seed).state_dict()) for seed, name in enumerate(names, 2))
    torch.save(other | average, tmp_path / "w.pt")
    first = ", ".join(list(other)[:3])
    said = f"the prefix '{names[1]}.' ({len(other)} others are left out: {first}, ...)"
    check_read(tmp_path / "w.pt", random_net(NET, 3).state_dict(), caplog, said)


def test_of_nets_none_of_which_is_the_average_none_is_chosen(net, tmp_path):
    torch.save(under("student.", net.state_dict()) | under("schema.", net.state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt' holds several nets \(under 'schema\.', 'student\.'\): save one of"):
        load_pretrained(tmp_path / "w.pt", NET)


def test_an_error_names_the_prefix_and_what_is_missing_without_it(net, tmp_path, caplog):
    state = net.state_dict()
    del state["time_embed.0.weight"]
    state["extra"] = torch.zeros(1)
    save_file(under("module.", state), tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "w.safetensors", NET)
    assert (
        "w.safetensors', without the prefix 'module.', don't fit the net: 1 missing (time_embed.0.weight); "
        "1 unexpected (extra): set model"
    ) in str(error.value)
    assert not caplog.messages
