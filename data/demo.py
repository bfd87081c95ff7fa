"""Write the embedded demo data, captioned shapes as shards: `python -m data.demo out=DIR`."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.cli import arguments, parse
from data.prepare.packing import check_shard_size, claim_folder, finished, key_of
from data.prepare.scenes import Scene, describe, draw
from data.storage.tars import write_shard

# Raise it whenever the same seed would draw other pictures, so that old and new shards do not mix in one folder.
VERSION = 1


@dataclass
class DemoArgs:
    """Write procedural scenes with true captions as webdataset shards."""

    out: str
    samples: int = 1500
    shard_size: int = 128
    seed: int = 0


def sample(seed: int, index: int, key: str) -> dict[str, bytes]:
    """The scene number `index` as the members of a sample: jpg, txt, json."""
    scene = describe(seed, index)
    jpeg = io.BytesIO()
    # 4:4:4, or the colours would bleed over the edges of small shapes.
    draw(scene).save(jpeg, "JPEG", quality=92, subsampling=0)
    facts = json.dumps(_facts(scene, key), indent=1)
    return {"jpg": jpeg.getvalue(), "txt": scene.caption.encode(), "json": facts.encode()}


def main(argv: list[str] | None = None) -> None:
    args = parse(DemoArgs, arguments(argv))
    check_shard_size(args.shard_size)
    if args.samples < 1:
        raise SystemExit(f"samples={args.samples}: must be at least 1")
    if args.seed < 0:
        raise SystemExit(f"seed={args.seed}: must not be negative")
    out = Path(args.out)
    recipe = {"samples": args.samples, "shard_size": args.shard_size, "seed": args.seed, "version": VERSION}
    claim_folder(out, "demo.json", recipe)
    with tqdm(total=args.samples, desc="scenes", unit="img") as bar:
        for number, first in enumerate(range(0, args.samples, args.shard_size)):
            indices = range(first, min(first + args.shard_size, args.samples))
            shard = out / f"{number:05d}.tar"
            if finished(shard) is None:
                keys = [key_of(number, place) for place in range(len(indices))]
                write_shard(
                    shard, [(key, sample(args.seed, index, key)) for key, index in zip(keys, indices, strict=True)]
                )
            bar.update(len(indices))
    print(f"{args.samples} scenes in {number + 1} shards: {out}")


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
