"""The metrics and the sample grids as TensorBoard reads them: RUN_DIR/tensorboard, with a file for each start."""

import logging
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

logger = logging.getLogger(__name__)

FOLDER, NAME = "tensorboard", "events.out.tfevents."
# A record: the length of an event, the length's checksum, the event, its checksum.
HEAD, TAIL = struct.Struct("<QI"), 4


def check_tensorboard(wanted: bool) -> None:
    """Check that event files can be written, if the run shall write them.

    Raises: ValueError if the package is missing, or does not fit the others.
    """
    if not wanted:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard=true needs the package tensorboard ({error}): pip install tensorboard, or leave the key out"
        ) from None


class EventFiles:
    """Writes what is logged as events, all values of a step as one event; only rank 0 has one.

    torch's SummaryWriter would open the file for each value, and fail in a thread of its own.
    step: the step that the run resumes from. Events of later steps, which an earlier start wrote, are cut off, since
    those steps are made again.
    Raises: OSError if the files cannot be written.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        # Here and below: not every run needs them, and not every installation has them.
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard import RecordWriter

        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        before = sorted(folder.glob(f"{NAME}*"))
        for path in before:
            cut_after(path, step)
        # TensorBoard reads the files in the order of their names. With the time in them, as is usual, that would be
        # another one than that of the starts where the clocks of nodes differ.
        numbers = [int(number) for path in before if (number := path.name.removeprefix(NAME)).isdecimal()]
        self.path = folder / f"{NAME}{max(numbers, default=0) + 1:010d}"
        self._records = RecordWriter(open(self.path, "ab"))  # noqa: SIM115 - closed in close()
        self._failed = False
        # A TensorBoard that is open forgets the later steps when it reads this. The cut is needed too: the reader that
        # TensorBoard takes where it can, tensorboard-data-server 0.7, passes over it.
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Write the metrics of a step under their names: numbers as scalars, words as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import scalar, text

        found = [(text if isinstance(value, str) else scalar)(name, value) for name, value in metrics.items()]
        self._write(step=step, summary=Summary(value=[value for summary in found for value in summary.value]))

    def image(self, step: int, name: str, path: Path) -> None:
        """Write a PNG of the run's folder."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as picture:
            (width, height), channels = picture.size, len(picture.getbands())
        image = Summary.Image(width=width, height=height, colorspace=channels, encoded_image_string=path.read_bytes())
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Close the file of this start."""
        with suppress(OSError):  # which the last write has told
            self._records.close()

    def _write(self, **event: Any) -> None:
        """Write at once, as metrics.jsonl is, so that no kill loses a line. If it fails the training goes on."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self._failed:
            return
        try:
            self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
            self._records.flush()
        except OSError as error:
            logger.warning("nothing more is written for TensorBoard in this start: '%s': %s", self.path, error)
            self._failed = True


def cut_after(path: Path, step: int) -> None:
    """Cut an event file before its first event of a step after `step`, or before what is no whole event.

    Raises: OSError.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    size, kept = path.stat().st_size, 0
    with open(path, "rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            length, _ = HEAD.unpack(head)
            end = file.tell() + length + TAIL
            try:
                if end > size or Event.FromString(file.read(length)).step > step:
                    break
            except DecodeError:
                break
            file.seek(kept := end)
    if kept < size:
        os.truncate(path, kept)
