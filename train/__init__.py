"""The training and the commands around a run."""

from if_train import refuse_foreign_packages

refuse_foreign_packages()

import data  # noqa: E402, F401  Ctrl-C is handled from here on, in a command of this package too
