#!/usr/bin/env bash
# Train on every host of a hostfile (lines of `name slots=8`), started from one of them through pdsh and ssh.
# Every host needs this folder and the environment under the same paths, and ssh without a password.
#
# The other hosts start with the variables whose names begin with PYTHON, MLFLOW, MV2 or UCX, those that DeepSpeed
# exports for the accelerator (NCCL*), and the lines of ~/.deepspeed_env and ./.deepspeed_env: NAME=value each,
# without blank lines or comments, which end the launcher with a ValueError.
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to it reaches the ranks of this host; with all others they save and leave, and it
# ends with 75. From a host that has none of the ranks nothing can be passed on: send the signal to any one rank.
set -euo pipefail

if [[ $# -lt 2 || ! -f $1 || ! -f $2 ]]; then
    echo "usage: $0 HOSTFILE CONFIG.yaml [--section.key value ...]" >&2
    exit 2
fi
hostfile=$1
config=$2
shift 2

# A hostfile with one host would take the single-node path, on which `deepspeed` reads no .deepspeed_env.
exec python -m sft.launch \
    deepspeed --hostfile "$hostfile" --force_multi --module sft.train --config "$config" "$@"
