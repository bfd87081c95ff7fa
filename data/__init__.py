"""Shards to batches, text embeddings, and the commands that make shards."""

import sys

# Python imports this first for `python -m data.X`, train.X or launch.X, while it looks for the command.
if sys.argv[0] == "-m":
    from data.interrupt import handle_ctrl_c

    handle_ctrl_c()
