"""The frozen encoder: the one that a meta describes is found again, and no other is taken for it."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data.storage.tars import write_shard
from data.text.encoder import TextEncoder, load_encoder
from data.tiny_t5 import TinyT5, write_tiny_t5

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    write_tiny_t5(TinyT5(out=str(folder)))
    return folder


def saved(t5: Path, out: Path, dtype: torch.dtype, change: bool = False) -> Path:
    model = T5EncoderModel.from_pretrained(t5, dtype=torch.float32)
    if change:
        model.encoder.block[1].layer[0].SelfAttention.o.weight.data[3, 5] *= 1.02
    model.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(t5).save_pretrained(out)
    return out


def test_the_hash_is_of_the_weights_not_of_how_they_are_kept(t5, tmp_path):
    half = saved(t5, tmp_path / "half", torch.bfloat16)
    metas = [
        TextEncoder(str(folder), 20, compute, CPU).meta("float16")
        for folder in (t5, half)
        for compute in ("float32", "bfloat16")
    ]
    assert len({meta.weights_sha256 for meta in metas}) == 1
    assert len({meta.tokenizer_sha256 for meta in metas}) == 1


def test_the_encoder_of_a_meta_is_found_again(t5, tmp_path):
    meta = TextEncoder(str(t5), 20, "bfloat16", CPU).meta("float16")
    encoder = load_encoder(meta)
    assert (encoder.tokens, encoder.compute, encoder.cleaning) == (20, "bfloat16", meta.cleaning)
    moved = shutil.copytree(t5, tmp_path / "moved")
    here, there = encoder(["a cat", ""]), load_encoder(meta, str(moved))(["a cat", ""])
    assert here.std() > 0.05
    np.testing.assert_array_equal(here, there)


def test_another_is_refused(t5, tmp_path):
    meta = TextEncoder(str(t5), 20, "float32", CPU).meta("float16")
    changed = saved(t5, tmp_path / "changed", torch.float32, change=True)
    with pytest.raises(ValueError, match="is another encoder than the one that the captions were embedded with"):
        load_encoder(meta, str(changed))
    with pytest.raises(ValueError, match="with another tokenizer"):
        load_encoder(replace(meta, tokenizer_sha256="0"))
    with pytest.raises(ValueError, match=r"is 64 wide, the embeddings of .* are 48"):
        load_encoder(replace(meta, dim=48))
    with pytest.raises(ValueError, match="cleaning=washed must be one of"):
        load_encoder(replace(meta, cleaning="washed"))
    with pytest.raises(ValueError, match="compute=float16 must be one of"):
        load_encoder(replace(meta, compute="float16"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_encoder(replace(meta, encoder=str(tmp_path / "gone")))


def test_a_tokenizer_that_does_not_fit_is_refused_before_any_caption(t5, tmp_path):
    T5EncoderModel(T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1)).save_pretrained(
        tmp_path / "small"
    )
    AutoTokenizer.from_pretrained(t5).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"gives ids up to \d+, its encoder knows 100"):
        TextEncoder(str(tmp_path / "small"), 20, "float32", CPU)


def test_a_model_that_overflows_says_which_caption(t5, tmp_path):
    model = T5EncoderModel.from_pretrained(t5, dtype=torch.float32)
    model.encoder.final_layer_norm.weight.data *= 1e39
    model.save_pretrained(tmp_path / "hot")
    AutoTokenizer.from_pretrained(t5).save_pretrained(tmp_path / "hot")
    with pytest.raises(ValueError, match=r"is not finite in float32 on the caption 'a cat'"):
        TextEncoder(str(tmp_path / "hot"), 20, "float32", CPU)(["a cat"])


def test_a_hub_that_is_not_there_is_told_in_one_line(repo, tmp_path):
    """The server takes connections and counts them, and answers none: transformers alone would try each file again."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        write_shard(tmp_path / "shards" / "00000.tar", [("0", {"txt": b"a"})])
        given = [f"shards={tmp_path / 'shards'}", f"out={tmp_path / 'out'}", "encoder=nobody/nothing"]
        done = subprocess.run(
            [sys.executable, "-m", "data.embed", *given], cwd=repo, env=environment, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        server.setblocking(False)
        tried = 0
        with suppress(BlockingIOError):
            while server.accept():
                tried += 1
    assert 1 <= tried <= 2, "one question of ours, and one that huggingface_hub may have of its own"
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the encoder 'nobody/nothing' cannot be loaded (there is no such folder")
