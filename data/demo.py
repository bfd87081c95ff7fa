"""Write the demo data, pictures of captioned shapes, as shards: `python -m data.demo out=DIR`."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from data.checks import check_at_least, count
from data.cli import command, location
from data.prepare.packing import check_shard_size, finished, key_of, record_recipe
from data.prepare.scenes import Scene, describe, draw
from data.progress import Progress
from data.storage.tars import write_shard

# To be raised when the same seed draws other pictures, so that old and new shards do not mix in one folder.
VERSION = 1


@dataclass
class Demo:
    """Draws scenes of coloured shapes with captions that say what is in them, and writes both as webdataset shards.

    A rerun makes only what is missing.

    out: folder for the shards.
    samples: number of pictures.
    shard_size: pictures in a shard.
    seed: seed of the scenes; the same seed draws the same pictures.
    """

    out: str = location()
    samples: int = 1500
    shard_size: int = 128
    seed: int = 0


def sample(seed: int, index: int, key: str) -> dict[str, bytes]:
    """The members of the sample that shows scene number `index`: jpg, txt, json."""
    scene = describe(seed, index)
    jpeg = io.BytesIO()
    # 4:4:4: with subsampled colours those of small shapes would bleed over their edges.
    draw(scene).save(jpeg, "JPEG", quality=92, subsampling=0)
    facts = json.dumps(_facts(scene, key), indent=1)
    return {"jpg": jpeg.getvalue(), "txt": scene.caption.encode(), "json": facts.encode()}


def write_demo(args: Demo) -> None:
    """Write the shards that are not there yet.

    Raises: ValueError if an argument cannot be, or the folder holds another dataset; OSError.
    """
    check_shard_size(args.shard_size)
    check_at_least("samples", args.samples, 1)
    check_at_least("seed", args.seed, 0)
    out = Path(args.out)
    recipe = {"samples": args.samples, "shard_size": args.shard_size, "seed": args.seed, "version": VERSION}
    record_recipe(out, "demo.json", recipe)
    scenes = range(args.samples)
    shards = [scenes[first : first + args.shard_size] for first in range(0, args.samples, args.shard_size)]
    todo = [number for number in range(len(shards)) if not finished(out / f"{number:05d}.tar")]
    missing = sum(len(shards[number]) for number in todo)
    with Progress("scenes", args.samples, "scene", out, args.samples - missing) as progress:
        for number in todo:
            keyed = [(key_of(number, row), index) for row, index in enumerate(shards[number])]
            write_shard(out / f"{number:05d}.tar", [(key, sample(args.seed, index, key)) for key, index in keyed])
            progress.update(len(keyed))
    print(f"{count(args.samples, 'scene')} in {count(len(shards), 'shard')}: {out}")


def main(argv: list[str] | None = None) -> None:
    command(write_demo, Demo, argv)


def _facts(scene: Scene, key: str) -> dict:
    things = [
        {"shape": t.shape, "colour": t.colour, "size": t.size, "box": [round(v, 2) for v in scene.box(t)]}
        for t in scene.things
    ]
    return {
        "caption": scene.caption,
        "url": "",
        "key": key,
        "status": "success",
        "width": scene.width,
        "height": scene.height,
        "things": things,
        "relation": scene.relation,
        "ground": {"tone": scene.tone, "texture": scene.texture},
    }


if __name__ == "__main__":
    main()
