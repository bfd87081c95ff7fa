"""The demo scenes: the same bytes from the same seed, and captions that the pixels bear out."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import demo
from data.images import preprocess
from data.prepare.scenes import COLOURS, RELATIONS, SHAPES, SIZES, TONES, VOCABULARY, describe, draw
from data.storage.shards import find_shards
from data.storage.tars import read_shard, stats_path
from train.evaluation.scene_alignment import Alignment, alignment, detect, matches

MEMBERS = {"jpg", "txt", "json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path) -> list[dict[str, bytes]]:
    return [members for shard in find_shards(folder) for _, members in read_shard(shard.location, MEMBERS)]


def write(folder: Path, **arguments: int) -> Path:
    demo.write_demo(demo.Demo(str(folder), **arguments))
    return folder


def seen(size: int, count: int, seed: int = 0, shift: float = 0.1) -> list[tuple[np.ndarray, str]]:
    """What the network would see of the first scenes, [H, W, 3], and their captions."""
    rng = np.random.default_rng(seed)
    made = [demo.sample(seed, index, "key") for index in range(count)]
    return [(preprocess(m["jpg"], size, shift, rng).transpose(1, 2, 0), m["txt"].decode()) for m in made]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, str]]:
    return seen(64, 200)


def swaps(caption: str) -> list[str]:
    """The captions that differ from this one in one word that can be seen."""
    changed = []
    for words in (tuple(COLOURS), SHAPES, tuple(SIZES), RELATIONS, tuple(TONES)):
        for word in words:
            if f" {word} " in f"{caption} ":
                changed += [
                    f"{caption} ".replace(f" {word} ", f" {other} ", 1)[:-1] for other in words if other != word
                ]
    return changed


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = write(tmp_path / "a", samples=20, shard_size=8, seed=5)
    assert contents(write(tmp_path / "b", samples=20, shard_size=8, seed=5)) == contents(first)
    assert (
        contents(write(tmp_path / "c", samples=20, shard_size=8, seed=6))["00000.tar"] != contents(first)["00000.tar"]
    )


def test_fewer_samples_are_the_first_ones_of_more(tmp_path: Path) -> None:
    few, more = write(tmp_path / "few", samples=10, shard_size=8), write(tmp_path / "more", samples=20, shard_size=8)
    assert samples(few) == samples(more)[:10]


def test_shards_are_laid_out_like_img2datasets(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", samples=20, shard_size=8)
    assert [(shard.name, shard.count) for shard in find_shards(folder)] == [
        ("00000.tar", 8),
        ("00001.tar", 8),
        ("00002.tar", 4),
    ]
    key, members = list(read_shard(folder / "00002.tar", MEMBERS))[3]
    facts = json.loads(members["json"])
    assert key == facts["key"] == "000020003"
    assert facts["caption"] == members["txt"].decode() == describe(0, 19).caption
    assert json.loads(stats_path(folder / "00002.tar").read_text())["successes"] == 4


def test_a_rerun_writes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", samples=20, shard_size=8)
    whole = contents(folder)
    untouched = (folder / "00000.tar").stat().st_mtime_ns
    (folder / "00001.tar").unlink()
    # A tar without its stats was cut short, whatever is in it.
    stats_path(folder / "00002.tar").unlink()
    (folder / "00002.tar").write_bytes(b"half")
    write(folder, samples=20, shard_size=8)
    assert contents(folder) == whole
    assert (folder / "00000.tar").stat().st_mtime_ns == untouched


def test_a_folder_holds_one_dataset(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", samples=4, shard_size=4)
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\)"):
        write(folder, samples=4, shard_size=4, seed=1)
    (folder / "demo.json").unlink()
    with pytest.raises(ValueError, match=r"shards of another command \(no demo\.json\)"):
        write(folder, samples=4, shard_size=4)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"shard_size": 0}, {"shard_size": 10_001}, {"seed": -1}])
def test_impossible_arguments_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write(tmp_path / "d", **wrong)
    assert not (tmp_path / "d").exists()


def test_pictures_differ_in_size_and_every_word_is_used() -> None:
    scenes = [describe(0, index) for index in range(300)]
    assert {np.sign(scene.width - scene.height) for scene in scenes} == {-1, 0, 1}
    assert len({scene.width for scene in scenes}) > 50
    words = {word for scene in scenes for word in scene.caption.split()}
    assert words == set(VOCABULARY)
    # The smoke run has 16 tokens a caption, with the end mark.
    assert max(len(scene.caption.split()) for scene in scenes) < 16


@pytest.mark.parametrize("size", [64, 32])
def test_captions_are_true_of_what_the_network_sees(size: int) -> None:
    true = [matches(image, caption) for image, caption in seen(size, 200, seed=1)]
    assert np.mean(true) > 0.97


def test_no_crop_cuts_a_thing() -> None:
    for index in range(200):
        scene = describe(2, index)
        short = min(scene.width, scene.height)
        for thing in scene.things:
            box = scene.box(thing)
            for low, high, side in ((box[0], box[2], scene.width), (box[1], box[3], scene.height)):
                shift = min(0.1 * side, (side - short) / 2)
                assert low >= (side - short) / 2 + shift and high <= (side + short) / 2 - shift


def test_other_captions_are_false(pairs: list[tuple[np.ndarray, str]]) -> None:
    captions = [caption for _, caption in pairs]
    shuffled = [matches(image, caption) for (image, _), caption in zip(pairs, captions[1:] + captions[:1], strict=True)]
    assert np.mean(shuffled) < 0.02
    swapped = [matches(image, other) for image, caption in pairs[:40] for other in swaps(caption)]
    assert len(swapped) > 300 and np.mean(swapped) < 0.02


def test_scores_say_which_part_is_wrong() -> None:
    image, caption = next(pair for pair in seen(64, 50) if " above " in pair[1])
    right = alignment(image, caption)
    assert right.exact and right.score == 1.0 and right.tone is None
    turned = alignment(image, caption.replace(" above ", " below "))
    assert turned == Alignment(colour=1.0, shape=1.0, size=1.0, count=1.0, relation=0.0, tone=None)
    nothing = alignment(np.full((64, 64, 3), 128, np.uint8), caption)
    assert nothing == Alignment(colour=0.0, shape=0.0, size=0.0, count=0.0, relation=0.0, tone=None)
    alone = alignment(np.full((64, 64, 3), 128, np.uint8), "a small red circle on a grey striped ground")
    assert alone.tone == 1.0 and alone.score == pytest.approx(0.2)


def test_an_extra_thing_is_counted() -> None:
    image, caption = next(pair for pair in seen(64, 50) if " on a " in pair[1])
    crowded = image.copy()
    crowded[:8, :8] = COLOURS["red" if "red" not in caption else "blue"]
    assert matches(image, caption) and not matches(crowded, caption)
    assert alignment(crowded, caption).count == 0.0


def test_places_and_widths_are_measured_to_half_a_pixel() -> None:
    scene = next(s for s in (describe(7, index) for index in range(50)) if s.width == s.height and s.relation)
    found = {thing.colour: thing for thing in detect(np.asarray(draw(scene).resize((64, 64))))}
    for thing in scene.things:
        measured = found[thing.colour]
        assert (measured.x, measured.y, measured.width) == pytest.approx((thing.x, thing.y, thing.width), abs=0.5 / 64)


def test_noise_of_a_weak_sampler_does_not_mislead(pairs: list[tuple[np.ndarray, str]]) -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8) for image, _ in pairs]
    assert np.mean([matches(image, caption) for image, (_, caption) in zip(noisy, pairs, strict=True)]) > 0.95


def test_what_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(ValueError, match="a photo of a cat"):
        matches(np.zeros((64, 64, 3), np.uint8), "a photo of a cat")
    with pytest.raises(ValueError, match="float32"):
        matches(np.zeros((64, 64, 3), np.float32), "a small red circle on a grey striped ground")
