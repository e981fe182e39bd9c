#!/usr/bin/env bash
# Train on every GPU of this host, or on those in CUDA_VISIBLE_DEVICES. Run it in the environment that holds `deepspeed`.
# On CPU: DS_ACCELERATOR=cpu LOCAL_SIZE=<ranks> launch/single_node.sh ...
# A second run on the same host needs another port: MASTER_PORT=29501 launch/single_node.sh ...
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "usage: $0 CONFIG.yaml [--section.key value ...]" >&2
    exit 2
fi
config=$1
shift

# `deepspeed` on one node passes no signal on: SIGTERM would end it and leave its ranks running. Job control gives it
# a process group of its own, so that the whole group can be signalled and waited for.
set -m
deepspeed --master_port "${MASTER_PORT:-29500}" --module sft.train --config "$config" "$@" </dev/null &
group=$!

stop() {
    trap '' TERM INT HUP
    kill -TERM -- "-$group" 2>/dev/null || true
    while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
    exit 143
}
trap stop TERM INT HUP
wait "$group"
