"""The training and the commands around a run."""

import data  # noqa: F401  Ctrl-C is handled from here on, in a command of this package too
