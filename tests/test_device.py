"""No training goes on silently on a CPU: the reason why torch can use no GPU is one line, with the remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.device import OLDEST_DRIVER, Machine, check_device, check_ranks, default_device, find_machine, unusable
from launch.check_machine import DRIVER_OF_PINNED_CUDA
from train.compose import compose_config, names

A_GPU = Machine(driver="580.65.06", devices=8, cards=8, given=8, visible=None)
CUDA = ("2.13.0", "13.0")
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)  Sun Jul 27\n"


def root_of(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def card(slot: str, vendor: str = "0x10de", kind: str = "0x030200") -> dict[str, str]:
    return {f"sys/bus/pci/devices/{slot}/vendor": f"{vendor}\n", f"sys/bus/pci/devices/{slot}/class": f"{kind}\n"}


def test_what_a_machine_shows_of_its_gpus(tmp_path):
    files = {"proc/driver/nvidia/version": PROPRIETARY, "dev/nvidia0": "", "dev/nvidia11": "", "dev/nvidiactl": ""}
    files |= card("0000:01:00.0") | card("0000:02:00.0", kind="0x0c0330") | card("0000:03:00.0", vendor="0x8086")
    seen = find_machine({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "3,4"}, root_of(tmp_path, files))
    assert seen == Machine(driver="535.104.05", devices=2, cards=1, given=2, visible="3,4") and seen.has_gpu
    assert find_machine({}, root_of(tmp_path / "open", {"proc/driver/nvidia/version": OPEN})).driver == "580.65.06"
    bare = find_machine({"SLURM_GPUS_ON_NODE": "0"}, root_of(tmp_path / "bare", card("0", vendor="0x1af4")))
    assert bare == Machine("", 0, 0, 0, None) and not bare.has_gpu
    for i, sign in enumerate(({"dev/nvidia0": ""}, card("0"), {"proc/driver/nvidia/version": "in another form"})):
        assert find_machine({}, root_of(tmp_path / f"sign{i}", sign)).has_gpu, sign
    assert find_machine({"SLURM_GPUS_ON_NODE": "a100:8"}, tmp_path / "none").given == 8


@pytest.mark.parametrize(
    ("changed", "torch_build", "message"),
    [
        (
            {},
            ("2.13.0+cpu", None),
            r"^torch 2.13.0\+cpu is built without CUDA .*\(Slurm gave 8\): install torch's build",
        ),
        ({"given": 0}, ("2.13.0+cpu", None), r"\(this machine has one\)"),
        (
            {"driver": "535.104.05"},
            CUDA,
            r"^the NVIDIA driver 535.104.05 is too old for CUDA 13.0, which torch 2.13.0 is built for: .* driver 580",
        ),
        ({"driver": "525.60"}, ("2.5.1", "12.4"), "^$"),
        ({"driver": "470.82"}, ("2.5.1", "12.4"), "install driver 525 or later"),
        ({"driver": "unknown"}, CUDA, "^$"),
        ({"driver": ""}, CUDA, r"no driver of NVIDIA is loaded: install driver 580 or later, for CUDA 13.0 of torch"),
        ({"driver": ""}, ("3.0", "14.0"), "install a newer one, for CUDA 14.0"),
        ({"visible": ""}, CUDA, "^CUDA_VISIBLE_DEVICES='' hides every GPU: unset it$"),
        ({"visible": "-1"}, CUDA, "^CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
        ({"devices": 0}, CUDA, "there is no /dev/nvidia0 here: give this container or job a GPU"),
        ({"visible": "GPU-1234"}, CUDA, "^$"),
        ({}, CUDA, "^$"),  # torch's own words are to tell it
    ],
)
def test_the_reason_is_named(changed, torch_build, message):
    machine = Machine(**({name: getattr(A_GPU, name) for name in Machine.__slots__} | changed))
    assert re.search(message, unusable(machine, *torch_build))


def test_a_rank_without_a_gpu_of_its_own_is_named():
    check_ranks(8, 8, None)
    with pytest.raises(
        ValueError, match=r"8 ranks .* torch sees 2 GPUs \(CUDA_VISIBLE_DEVICES=6,7\): .*RANKS_PER_NODE=2"
    ):
        check_ranks(8, 2, "6,7")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ds_accelerator_cpu_is_asking_for_the_cpu(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_device(needs_gpu=True)
    for chosen in ("cuda", None):
        monkeypatch.delenv("DS_ACCELERATOR") if chosen is None else monkeypatch.setenv("DS_ACCELERATOR", chosen)
        with pytest.raises(ValueError, match=r"Slurm gave 8.*, or set DS_ACCELERATOR=cpu to run on the CPU$"):
            check_device()


def test_a_command_says_what_it_runs_on(monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert default_device() == torch.device("cpu")
    assert capsys.readouterr().out == "runs on the CPU, as DS_ACCELERATOR=cpu says\n"


def run(repo: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "SLURM_", "CUDA_"))}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=repo, env=own | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(find_machine().has_gpu, reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("train/main.py +experiment=smoke run_dir={tmp}/run", {"SLURM_GPUS_ON_NODE": "8"}, "Slurm gave 8"),
        ("train/main.py +experiment=if_i_m run_dir={tmp}/run", {}, "needs_gpu=true, and this machine has no GPU"),
        (
            "-m launch.preflight +experiment=if_i_xl run_dir={tmp}/run",
            {},
            "needs_gpu=true, and this machine has no GPU",
        ),
        ("-m data.embed mode=meta shards=none out={tmp}/run", {"SLURM_GPUS_ON_NODE": "1"}, "Slurm gave 1"),
    ],
)
def test_a_command_ends_in_one_line(repo, tmp_path, words, environment, message):
    done = run(repo, *words.format(tmp=tmp_path).split(), **environment)
    assert done.returncode == 2 and not done.stdout, done.stderr[-2000:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert message in done.stderr and done.stderr.endswith("or set DS_ACCELERATOR=cpu to run on the CPU\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_machine().has_gpu, reason="this machine has a GPU")
def test_a_dry_run_needs_no_gpu_and_says_that_the_training_would(repo, tmp_path):
    given = ["+experiment=if_i_m", "dry_run=true", f"run_dir={tmp_path}/run", "compile=false", "micro_batch=48"]
    done = run(repo, "train/main.py", *given)
    assert "371,605,830 parameters" in done.stdout
    assert "a training would not start on this machine: needs_gpu=true" in done.stdout
    assert "needs_gpu" not in done.stderr


def test_only_the_large_nets_need_a_gpu():
    needing = {name for name in names("experiment") if compose_config([f"+experiment={name}", "init_from=a"]).needs_gpu}
    tuning = {"finetune_lora", "finetune_dreambooth", "finetune_dreambooth_ii"}
    assert needing == {"if_i_m", "if_i_l", "if_i_xl", "if_ii_m", "if_ii_l", "own_gpu"} | tuning


def test_the_driver_that_the_install_names_is_that_of_the_pinned_cuda(repo):
    pinned = re.search(r"^cuda-toolkit==(\d+)", (repo / "constraints.txt").read_text(), re.MULTILINE)
    cuda, driver = DRIVER_OF_PINNED_CUDA
    assert cuda == int(pinned[1]) and driver == OLDEST_DRIVER[cuda]
    for page in ("docs/guide/first_run.md", "docs/guide/cluster.md"):
        assert f"driver {driver} or later" in (repo / page).read_text()
