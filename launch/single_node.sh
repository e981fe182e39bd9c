#!/usr/bin/env bash
# Train on every GPU of this host, or on those in CUDA_VISIBLE_DEVICES. Run it in the environment that holds `deepspeed`.
# On CPU: DS_ACCELERATOR=cpu LOCAL_SIZE=<ranks> launch/single_node.sh ...
# A second run on the same host needs another port: MASTER_PORT=29501 launch/single_node.sh ...
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to it: the ranks save and leave, and it ends with 75. The same command goes on.
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "usage: $0 CONFIG.yaml [--section.key value ...]" >&2
    exit 2
fi
config=$1
shift

# `deepspeed` passes no signal on, and loses the ranks' exit code: sft.launch does both.
exec python -m sft.launch \
    deepspeed --master_port "${MASTER_PORT:-29500}" --module sft.train --config "$config" "$@"
