#!/bin/sh
# The whole path on a small scale: scenes, their captions embedded, a UNet trained by two ranks on the CPU.
# Each command skips what is already done; delete runs/demo and the run's folder to start afresh.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
# The same path on every machine, whatever accelerators it has, and one thread for each of the two ranks.
export PATH DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

started=$(date +%s)
python -m launch.smoke_time
python -m data.demo out=runs/demo/shards samples=2000
python -m data.tiny_t5 out=runs/demo/encoder
python -m data.embed shards=runs/demo/shards out=runs/demo/text encoder=runs/demo/encoder tokens=16

# A free port, so that two runs on one machine do not meet on the launcher's default.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# -q: of the launcher's own lines only its errors.
echo "A few steps at 64 px, the size of IF's first stage:"
deepspeed -q --num_gpus 2 --master_port "$port" train/main.py +experiment=smoke_64
echo "A net of 16 px, which learns colours in two minutes:"
deepspeed -q --num_gpus 2 --master_port "$port" train/main.py +experiment=smoke
echo "took        $(($(date +%s) - started)) s"
