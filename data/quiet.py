"""Keeps off the screen what libraries say of a run that is well. Each message is named; errors and all else pass."""

import logging
import os
import warnings

from data.progress import shows_bars

# By the name of the logger, the beginnings of the messages that it does not print.
LOGGED: dict[str, tuple[str, ...]] = {
    "DeepSpeed": (
        # A run on the CPU is meant to be there: data/device.py has looked for a GPU.
        "Setting accelerator to CPU.",
        # AdamW8bit under ZeRO-1 is tested here: tests/test_checkpoint.py, tests/test_train.py.
        "**** You are using ZeRO with an untested optimizer",
    ),
    # A kernel for 4-bit weights, which no net here has.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # diffusers' pipelines import it for the safety checker, which is not used.
    "transformers.utils.import_utils": ("`CLIPImageProcessor` requires torchvision",),
}
# Warnings, by a regular expression of their beginning. DeepSpeed and clean-fid must fix them.
WARNED = (
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    (r"`torch\.jit\.\w+` is deprecated", DeprecationWarning),
)


class _Without(logging.Filter):
    """Drops the messages with these beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not str(record.msg).startswith(self._beginnings)


def quiet_libraries() -> None:
    """Drop the messages above in this process, and bars where ours are none; called by commands, before they import
    the libraries.
    """
    if not shows_bars():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers obeys it too
    for name, beginnings in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginnings))
    # It prints its own warnings, which would come again from the root's handler.
    logging.getLogger("huggingface_hub").propagate = False
    for message, category in WARNED:
        warnings.filterwarnings("ignore", message, category)
