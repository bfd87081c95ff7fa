"""The checks for a GPU, on a CPU with tiny nets: every part runs, and what is wrong makes its part fail."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.unet import UNet
from tests.gpu_check import memory, nets, overlap, parity, resume, speed, syncs
from tests.gpu_check.__main__ import NEVER_PROVEN, GPUCheck, check_arguments, main, settle
from tests.gpu_check.check import (
    FAILED,
    HOLDS,
    LEFT_OUT,
    MEASURED,
    NOT_MEASURED,
    PARTS,
    PLANNED,
    Check,
    Row,
    attempt,
    run_part,
)  # fmt: skip
from tests.gpu_check.speed import EAGER, PEER, WHOLE, WHOLE_NHWC
from tests.gpu_check.trainer import Trainer

# What a bare machine lacks; the folder must be imported without them.
LOADERS = ("PIL", "boto3", "webdataset", "matplotlib", "wandb", "hydra", "pyarrow")


@pytest.fixture(autouse=True)
def torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


def rows_of(part: str, **changes: object) -> dict[str, Row]:
    """The last row of each name, those that were only planned left out."""
    found = {row.name: row for row in run_part(part, Check(**changes))}
    return {name: row for name, row in found.items() if row.result != PLANNED}


def command(folder: Path, *arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """The command as a user calls it in a folder, on a Python that lacks some packages."""
    # What a start-up file hides is hidden in the processes of the parts too.
    hidden = folder / "start-up"
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n")
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu_check", *arguments], cwd=folder, capture_output=True, text=True, timeout=1800,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(hidden), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def copy_of_project(repo: Path, folder: Path) -> Path:
    """What the checks import, to be changed."""
    for name in ("model", "data", "train", "launch", "tests/gpu_check"):
        shutil.copytree(repo / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repo / "if_train.py", folder)
    return folder


@pytest.fixture(scope="module")
def everything(repo, tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """All parts on a CPU, and the JSON that they wrote."""
    folder = copy_of_project(repo, tmp_path_factory.mktemp("everything") / "project")
    done = command(folder, "device=cpu", "size=tiny", "budget=1800", "out=found/it.json")
    return done, json.loads((folder / "found" / "it.json").read_text())


def of_part(everything: tuple[subprocess.CompletedProcess, dict], part: str) -> dict[str, dict]:
    return {row["name"]: row for row in everything[1]["rows"] if row["part"] == part}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(everything):
    done, found = everything
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found["seconds"]) == list(PARTS) == list(dict.fromkeys(row["part"] for row in found["rows"]))
    assert found["failed"] == [] and {row["result"] for row in found["rows"]} == {HOLDS, MEASURED, LEFT_OUT}
    assert len(found["not_proven"]) == sum(row["result"] == LEFT_OUT for row in found["rows"]) + len(NEVER_PROVEN)
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(found["rows"]) and table[0] == "| part | what | result | in words |"
    assert all(line.count(" | ") == 3 for line in table)
    assert done.stdout.endswith("\nNothing failed.\n")


@pytest.mark.slow
def test_what_the_parts_find_on_a_cpu(everything):
    assert of_part(everything, "environment")["card"]["text"].startswith("needs a GPU")
    parity = of_part(everything, "parity")
    assert parity["bfloat16"]["figures"]["gradients"] > 1e-3 > 1e-5 > parity["float32"]["figures"]["gradients"] > 0
    assert parity["float64"]["figures"]["output_std"] > 0.1
    compiled = of_part(everything, "fewbit_recompute")["compiled gelu_3bit, cheap"]["figures"]
    assert 0.2 > compiled["gradients_bfloat16_eager"] > 1e-4
    assert "ZeRO-1, AdamW8bit: two runs are equal" in of_part(everything, "resume")["eager"]["text"]
    assert of_part(everything, "syncs")["whole step"]["text"].startswith("ZeRO-1, AdamW8bit, 2 micro batches a step")
    assert of_part(everything, "syncs")["text states of lowrank"]["text"].startswith("the bits of the CPU")
    assert [row["result"] for row in of_part(everything, "memory").values()] == [HOLDS] * 2 + [LEFT_OUT] * 2
    # Compiled whole, the backward is one node of autograd: nothing is ready before its end.
    overlap = of_part(everything, "overlap")
    assert overlap["compiled whole"]["figures"]["shares"]["75%"] < 0.1
    assert 0 < overlap["eager"]["figures"]["shares"]["25%"] < overlap["eager"]["figures"]["shares"]["75%"]
    speed = of_part(everything, "speed")
    assert set(speed) == {"512", *(f"512, micro batch 2, {way}" for way in (EAGER, PEER, WHOLE, WHOLE_NHWC))}
    assert speed[f"512, micro batch 2, {PEER}"]["figures"]["of_ours_eager"] > 0
    assert "need a GPU" in speed[f"512, micro batch 2, {EAGER}"]["text"]


@pytest.mark.slow
def test_a_bare_machine_runs_what_it_can_and_says_what_it_cannot(repo, tmp_path):
    folder = copy_of_project(repo, tmp_path / "project")
    bare = (*LOADERS, "deepspeed", "bitsandbytes", "diffusers", "peft")
    done = command(folder, "device=cpu", "size=tiny", "parts=environment,parity,syncs,nccl", without=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("| part | what | result | in words |\n|---|---|---|---|\n| environment | Python | ")
    assert "| parity | parity | left out | needs diffusers |" in done.stdout
    assert "| nccl | all_reduce | holds | gloo, one rank" in done.stdout
    assert "- parity, parity: left out, needs diffusers\n" in done.stdout
    assert "- more than one GPU" in done.stdout and done.stdout.endswith("\nNothing failed.\n")

    found = json.loads((folder / "gpu_check.json").read_text())
    assert set(found["seconds"]) == {"environment", "parity", "syncs", "nccl"}
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    assert rows["environment", "deepspeed"]["result"] == LEFT_OUT
    assert rows["syncs", "engine"]["text"].startswith("needs deepspeed and bitsandbytes")
    assert rows["syncs", "whole step"]["figures"]["counts"]["numbers read"] >= 0
    assert found["failed"] == [] and any("needs diffusers" in line for line in found["not_proven"])
    assert not list(folder.glob("*.part"))


def test_a_wrong_net_is_found_by_the_command(repo, tmp_path):
    folder = copy_of_project(repo, tmp_path / "project")
    blocks = folder / "model" / "blocks.py"
    right = blocks.read_text()
    wrong = right.replace("norm.weight * (1 + scale)", "norm.weight * scale")
    assert wrong != right
    blocks.write_text(wrong)
    done = command(folder, "device=cpu", "size=tiny", "parts=parity", "out=found/it.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "| parity | float64 | FAILED | output " in done.stdout and "\nFailed:\n- parity, float64: " in done.stdout
    found = json.loads((folder / "found" / "it.json").read_text())
    assert "parity, float64" in found["failed"] and "parity, few-bit GELU's forward" not in found["failed"]


def test_time_that_runs_out_is_named(repo, tmp_path):
    folder = copy_of_project(repo, tmp_path / "project")
    done = command(folder, "device=cpu", "size=tiny", "parts=parity", "budget=6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| parity | parity | not measured | stopped after its 1 s |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["parts=parety"], "parts=parety is not known (did you mean 'parity'?)"),
        (["shapes=S"], "shapes=S is not known"),
        (["device=tpu"], "device=tpu is not known"),
        (["size=small", "device=cpu"], "size=small is not known"),
        (["parts=[]"], "parts= is empty"),
        (["budget=3", "device=cpu"], "budget=3: must be more than 5 seconds"),
        (["bugdet=3"], "unknown key 'bugdet'"),
    ],
)
def test_a_mistake_ends_with_2(arguments, error, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and error in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_remedy_is_named():
    with pytest.raises(ValueError, match=r"finds no GPU that it can use: .* device=cpu size=tiny"):
        check_arguments(GPUCheck())


def test_what_was_planned_and_not_done_is_not_measured():
    rows = [Row("a", PLANNED), Row("b", PLANNED), Row("a", HOLDS)]
    assert list(settle(iter(rows))) == [Row("a", HOLDS), Row("b", NOT_MEASURED, "out of time")]


def test_an_error_is_a_failure_and_too_little_memory_is_not():
    def too_large() -> Row:
        raise torch.OutOfMemoryError("4 GiB")

    def broken() -> Row:
        raise KeyError("weight")

    assert attempt("x", too_large).result == NOT_MEASURED
    row = attempt("x", broken)
    assert (row.result, row.text) == (FAILED, "KeyError: 'weight'") and "broken" in row.figures["traceback"]


def test_every_part_can_be_run():
    folder = Path(nets.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} >= set(PARTS)


def test_a_recomputation_that_changes_something_is_found(monkeypatch):
    from model import blocks

    monkeypatch.setattr(blocks, "recomputed", lambda function, *args: function(*args) * (1 + 1e-6))
    from tests.gpu_check import fewbit_recompute

    net = nets.build(nets.TINY, "cpu", activation=nets.FEW_BIT)
    row = fewbit_recompute.as_kept(Check(), "cheap, float32", nets.RECOMPUTE[1], net, nets.images(nets.TINY, 2, "cpu"))
    assert row.result == FAILED and "tensors differ" in row.text


def test_resume_and_a_resume_that_loses_the_moments(monkeypatch):
    monkeypatch.setattr(resume, "make_trainer", Trainer)  # a process can join a group of ranks only once
    monkeypatch.setattr(resume, "has_engine", lambda: False)
    rows = rows_of("resume")
    assert rows["engine"].result == LEFT_OUT and rows["eager"].result == HOLDS, rows

    def load(self, path):
        self.net.load_state_dict(torch.load(path)["net"])

    monkeypatch.setattr(Trainer, "load", load)
    row = rows_of("resume")["eager"]
    assert row.result == FAILED and "the resumed one differs in" in row.text


def test_a_number_read_in_the_loss_is_found(monkeypatch):
    def loss(self):
        value = right(self)
        value.item()
        return value

    right = nets.Step.loss
    monkeypatch.setattr(nets.Step, "loss", loss)
    row = syncs.net_row("net", Check(), compiled=False)
    assert row.result == FAILED and row.text.startswith(f"numbers read: {syncs.BATCHES}, in {syncs.BATCHES} micro")


def test_memory_against_a_plan_that_is_a_tenth_too_small(monkeypatch):
    plan = memory.net_bytes
    monkeypatch.setattr(memory, "parameters", lambda config: 0)  # so that the step alone is compared

    def too_small(*args):
        found = plan(*args)
        return replace(found, peak=int(found.peak * 0.9))

    monkeypatch.setattr(memory, "net_bytes", too_small)
    row = memory.net_row("x", Check(), "M", nets.KEEP)
    assert row.result == FAILED and "+11.1%" in row.text


def test_share_of_the_bytes_that_are_ready():
    assert overlap.share([(1.0, 30), (3.0, 50), (4.0, 20), (4.0, 0)], 0.75) == 0.8


def test_bouts_come_once_with_ours_and_every_shape_first():
    bouts = speed.bouts(Check(tiny=False), {"512": 100, "XL": 41})
    assert all(bout.ways[0] == speed.EAGER for bout in bouts)
    cells = [bout.cell(way) for bout in bouts for way in bout.ways[1:]]
    assert len(set(cells)) == len(cells)
    assert bouts[0].cell(speed.PEER) == "512, micro batch 50, diffusers, eager" and bouts[1].shape == "XL"
    assert {bout.micro_batch for bout in bouts if bout.shape == "XL"} == {20, 6, 41, 10}


def test_without_diffusers_ours_is_timed_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(speed, "fight", lambda bout, check, flops: [Row(bout.cell(way), MEASURED) for way in bout.ways])
    rows = rows_of("speed")
    assert rows["diffusers"].result == LEFT_OUT
    assert set(rows) == {"512", "diffusers", *(f"512, micro batch 2, {way}" for way in (EAGER, WHOLE, WHOLE_NHWC))}
    full = speed.without_peer(speed.bouts(Check(tiny=False), {"M": 100}))
    assert not [way for bout in full for way in bout.ways if way.startswith("diffusers")]
    assert all(len(bout.ways) > 1 for bout in full)


def test_nets_of_one_bout_share_their_parameters():
    net = nets.build(nets.TINY, "cpu")
    other = nets.build(nets.TINY, "cpu", activation=nets.FEW_BIT, like=net)
    assert all(a is b for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert not any(p.is_meta for p in [*other.parameters(), *other.buffers()])
    assert min(float(p.abs().max()) for p in net.parameters()) > 0


def test_parity_takes_no_other_weights_for_the_same():
    torch.manual_seed(0)
    net = nets.build(nets.TINY, "cpu", torch.float64)
    batch = nets.images(nets.TINY, 2, "cpu")
    exact = parity.of_ours(net, batch)
    assert parity.float64(net, batch, exact).result == HOLDS
    with torch.no_grad():
        nn.init.constant_(net.out[2].bias, 1.001)
    assert isinstance(net, UNet) and parity.float64(net, batch, exact).result == FAILED
