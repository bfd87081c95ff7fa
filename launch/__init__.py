"""Clusters, plans and the smoke run."""

import data  # noqa: F401  Ctrl-C is handled from here on, in a command of this package too
