#!/usr/bin/env bash
# Is this node fit for training? For ft_launcher.py, which lets an unfit node leave the job:
#
#   --ft-node-health-check 'examples/node_check.sh CHECKPOINT_DIRECTORY'
#
# Prints one line for each fault, with its remedy, and then ends with 1. Takes seconds; what hangs
# is a fault too. Variables: MIN_FREE_GB in the directory (10), MIN_SHM_MB in /dev/shm (256).
# No other node and no GPU that another process uses is touched.

set -uo pipefail
directory=${1:-.}
faults=0

fault() { echo "$1: $2" && faults=1; }

bounded() { timeout --kill-after=1 "$@"; } # SECONDS COMMAND...

check_gpus() {
  local gpus errors
  type -P nvidia-smi >/dev/null || return 0
  if ! gpus=$(bounded 15 nvidia-smi --list-gpus 2>&1); then
    fault "nvidia-smi fails or hangs: $gpus" "drain the node and reboot it; dmesg names the Xid"
  elif [[ $gpus != *'GPU '* ]]; then
    fault "no GPU is visible" "ask for --gpus-per-node, or drain the node"
  fi
  errors=$(bounded 15 nvidia-smi --format=csv,noheader \
    --query-gpu=index,ecc.errors.uncorrected.volatile.total | grep -E '^[0-9]+, *[1-9]')
  [[ -z $errors ]] || fault "uncorrected ECC errors on GPU (index, count) $errors" \
    "drain the node, reset the GPU with nvidia-smi --gpu-reset, and replace it if they return"
}

check_disk() {
  local free file=$directory/.node_check.$HOSTNAME.$$
  bounded 10 mkdir -p "$directory" || fault "$directory cannot be made within 10 s" \
    "mount its file system, or correct the path"
  free=$(bounded 10 df --output=avail --block-size=1G "$directory" | tail -n 1)
  ((${free:-0} >= ${MIN_FREE_GB:-10})) || fault "only ${free:-?} GB are free in $directory" \
    "delete old checkpoints there"
  bounded 20 dd if=/dev/zero of="$file" bs=1M count=16 conv=fsync status=none ||
    fault "16 MB cannot be written to $directory within 20 s" "look at quota, mount and server"
  bounded 5 rm -f "$file"
}

check_shared_memory() {
  local free
  free=$(df --output=avail --block-size=1M /dev/shm | tail -n 1)
  ((${free:-0} >= ${MIN_SHM_MB:-256})) || fault "only ${free:-?} MB are free in /dev/shm" \
    "remove what dead processes left there, or start the container with --shm-size"
}

check_arithmetic() {
  bounded 50 "${PYTHON:-python}" -c '
import torch

for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]:
    a = torch.arange(65536.0).remainder(7).reshape(256, 256)
    expected, found = a @ a, (a.to(device) @ a.to(device)).cpu()  # exact, as these are integers
    assert torch.equal(expected, found), f"{device} multiplies wrongly"
' 2>&1 || fault "a small matrix product fails" \
    "look at the lines above; of a GPU, drain the node and run dcgmi diag"
}

check_disk
check_shared_memory
check_gpus
check_arithmetic
exit "$faults"
