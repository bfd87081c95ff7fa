"""The start of many ranks: one looks at shards and checkpoints for all; each reads what it needs itself."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data import demo
from data.embed import Embed, embed
from data.loader.dataset import Dataset
from data.storage.shards import Shard, find_shards
from data.text.meta import EMPTY
from data.tiny_t5 import TinyT5, write_tiny_t5
from tests.checkpoints import write_manifest
from tests.support.split_checkpoint import split_checkpoint
from tests.support.trainings import free_port, launch, start
from train.checkpoint.format import latest_checkpoint
from train.checkpoint.resume import _is_here, check_same_everywhere
from train.config import Config

SUPPORT = Path(__file__).resolve().parent / "support"
SHARDS, FILES = 48, 32
QUIET = ("wandb.mode=disabled", "optim.name=adamw", "optim.warmup_steps=2", "save_every=3", "data.workers=0")


def many_shards(folder: Path) -> Path:
    """A shard for each of some scenes, counted by their stats files, and their embeddings."""
    demo.main([f"out={folder / 'shards'}", f"samples={SHARDS}", "shard_size=1"])
    write_tiny_t5(TinyT5(out=str(folder / "t5")))
    embed(Embed(str(folder / "shards"), str(folder / "text"), str(folder / "t5"), 16, "float32", "float32"))
    return folder


def count_looks(repo: Path, data: Path, run_dir: Path, out: Path) -> list[dict]:
    """What each of two ranks looks at in data and run_dir, from the start to the end of a step."""
    script, folder = SUPPORT / "counted_start.py", str(data.parent)
    run = start(repo, data, run_dir, *QUIET, "steps=4", ranks=2, script=script, before=(str(out), folder))
    said = "".join(run.communicate(timeout=300))
    assert run.returncode == 0 and "resumes from step 3" in said, said[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_one_rank_looks_for_all(repo, tmp_path):
    data, run_dir = many_shards(tmp_path / "data"), tmp_path / "run"
    done = launch(repo, data, run_dir, *QUIET, "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    split_checkpoint(latest_checkpoint(run_dir), FILES)
    first, second = count_looks(repo, data, run_dir, tmp_path / "looks")
    opened = second.pop("opened")
    first.pop("opened")
    print("looks", first, second, sep="\n")
    for folder, most in (("data", 24), ("run", 12)):
        looks = [sum(rank.get(f"{folder} {kind}", 0) for kind in ("stat", "list")) for rank in (first, second)]
        assert looks[1] < most < looks[0], (folder, looks)
    # It verifies every other file, and reads the second half, which is its part.
    numbers = {int(path[-17:-12]) for path in opened if "step-00000003/rank-" in path}
    assert numbers == set(range(1, FILES, 2)) | set(range(FILES // 2, FILES))


def test_a_mistake_that_the_first_rank_finds_is_told_once_and_ends_all(repo, tmp_path):
    done = launch(repo, tmp_path, tmp_path / "run", *QUIET, "data.shards=nowhere", "steps=3", ranks=2)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1 and "nowhere': check the path" in done.stderr
    assert "Traceback" not in done.stderr and "ends because" not in done.stderr


def say_what_is_seen(rank: int, port: int, cases: list[list[Path]], told: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    datasets: list[list[Dataset]] = [[]]
    for number, disks in enumerate(cases):
        os.chdir(disks[rank])  # all paths are relative, so each rank has a disk of its own
        datasets = [[Dataset(find_shards("shards"), "text")]] if rank == 0 else [[]]
        dist.broadcast_object_list(datasets, src=0)
        try:
            check_same_everywhere(Config(run_dir="run"), datasets[0], [])
            said = "nothing"
        except ValueError as error:
            said = str(error)
        (told / f"{number}-{rank}").write_text(said)
    dist.destroy_process_group()


def test_ranks_that_see_different_disks_are_told(tmp_path):
    disks = [tmp_path / name for name in ("disk", "copy", "other run", "other captions", "fewer", "empty", "no text")]
    for disk in (*disks[:5], disks[6]):
        seed = int(disk.name == "other captions")
        demo.main([f"out={disk / 'shards'}", "samples=16", "shard_size=4", f"seed={seed}"])
    for disk in (*disks[:2], *disks[3:]):
        (disk / "run/checkpoints/step-00000004").mkdir(parents=True)
        write_manifest(disk / "run/checkpoints/step-00000004", {"step": 4})
    for disk in disks[:6]:
        (disk / "text").mkdir(parents=True)
        (disk / "text" / EMPTY).write_bytes(b"")
    for tar in list((disks[4] / "shards").glob("0000[23]*")):
        tar.unlink()
    torch.multiprocessing.spawn(
        say_what_is_seen, (free_port(), [[disks[0], other] for other in disks], tmp_path), nprocs=2
    )
    run, shards = "rank 1 sees another run_dir=run (its latest checkpoint) than", "rank 1 sees another data.shards="
    text = "rank 1 sees another data.text="
    for number, words in enumerate(("nothing", "nothing", run, shards, shards, shards, text)):
        for rank in range(2):
            assert (tmp_path / f"{number}-{rank}").read_text().startswith(words), disks[number].name


def test_an_index_may_count_a_shard_otherwise_than_its_stats_file(tmp_path):
    demo.main([f"out={tmp_path / 'shards'}", "samples=8", "shard_size=4"])
    (first, _) = find_shards(tmp_path / "shards")
    stats = Path(first.location.replace(".tar", "_stats.json"))
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"successes": 5}))
    size = os.path.getsize(first.location)
    assert _is_here(Shard(first.location, 4, size)) and not _is_here(Shard(first.location, 4, size + 512))
    assert _is_here(Shard(first.location, 5)) and not _is_here(Shard(first.location, 4))
