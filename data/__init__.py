"""Shards to batches, text embeddings, and the commands that make shards."""

import sys

if (
    sys.argv[0] == "-m"
):  # Python looks for the command of `python -m data.X`, train.X or launch.X, and imports this first
    from data.interrupt import handle_ctrl_c

    handle_ctrl_c()
