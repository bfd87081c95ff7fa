#!/bin/sh
# The whole path on a small scale: scenes, their captions embedded, a UNet trained by two ranks on the CPU.
# Each command skips what is already done; delete runs/demo and the run's folder to start afresh.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
# The same path on every machine, whatever accelerators it has, and one thread for each of the two ranks.
export PATH DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

python -m data.demo out=runs/demo/shards
python -m data.tiny_t5 out=runs/demo/encoder
python -m data.embed shards=runs/demo/shards out=runs/demo/text encoder=runs/demo/encoder

# A free port, so that two runs on one machine do not meet on the launcher's default.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# -q: of the launcher's own lines only its errors.
deepspeed -q --num_gpus 2 --master_port "$port" train/main.py +experiment=smoke
