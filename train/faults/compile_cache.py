"""What torch.compile wrote on one node, kept for those that did not compile: a spare, or the nodes of the next job.

It lies beside the code and not in run_dir: it is code, and a run that came from elsewhere is trusted with none.
"""

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from data.storage.atomic import atomic_file, atomic_folder
from train.config import CODE, Config

logger = logging.getLogger(__name__)

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
KEPT = CODE / ".compiled"


def prepare_cache(config: Config, kept_in: Path = KEPT) -> None:
    """Let torch.compile write into a folder of this net on this node; its first rank fills it with what was kept.

    The ranks meet before the net is compiled, so the others need not wait. A cache of the user's own stays as it is.
    """
    if not config.compile or VARIABLE in os.environ:
        return
    folder = _own_folder() / _name(config)
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        if folder.parent.lstat().st_uid != os.getuid():
            return  # somebody else's, who could put code there
        os.environ[VARIABLE] = str(folder)
        kept = kept_in / f"{folder.name}.tar"
        if folder.exists() or not kept.exists() or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        with atomic_folder(folder) as aside, tarfile.open(kept) as archive:
            # Before 3.10.12 and 3.11.4 Python has no filters; what is unpacked is code that will be run in any case.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(aside)
    except (OSError, tarfile.TarError) as error:
        logger.warning("the net is compiled again, since what was kept of it cannot be used: %s", error)


def keep_cache(kept_in: Path = KEPT) -> None:
    """Keep what the ranks of this node have compiled, if nothing is kept yet; without it a run goes on all the same."""
    folder = Path(os.environ.get(VARIABLE, ""))
    kept = kept_in / f"{folder.name}.tar"
    if folder.parent != _own_folder() or kept.exists():
        return
    try:
        with atomic_file(kept) as aside, tarfile.open(aside, "w") as archive:
            archive.add(folder, ".")
    except (OSError, tarfile.TarError) as error:
        logger.warning("what was compiled is not kept for other nodes: %s", error)


def _own_folder() -> Path:
    return Path(tempfile.gettempdir(), f"if_compiled_{os.getuid()}")


def _name(config: Config) -> str:
    """Names what the compiled code depends on; the compiler itself checks the rest, such as the GPU's kind."""
    net = [asdict(config.model), config.recompute, config.layout, config.micro_batch, config.precision]
    text = json.dumps([*net, config.data.tokens, asdict(config.lora), version("torch")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
