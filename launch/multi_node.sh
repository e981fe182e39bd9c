#!/usr/bin/env bash
# Train on every host of a hostfile (lines of `name slots=8`), started from one of them, or from a login node, through
# pdsh and ssh. JOB=doctor launch/multi_node.sh ... checks the same hosts for the same run instead.
# Every host needs this folder and the Python environment under the same paths, ssh without a password, and `out` on a
# file system that all share. MASTER_PORT (29500) must be free on the first host.
#
# The other hosts get this shell's NCCL_*, GLOO_*, WANDB_*, HF_*, CUDA_*, OMP_*, TORCH_*, PYTHON* and a few more
# (sft/launch_env.py), then the lines of ~/.deepspeed_env and ./.deepspeed_env. Secrets (*KEY*, *TOKEN*, ...) travel in a
# file that only you can read, never on a command line.
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to it: all ranks save and leave, and it ends with 75. The same command goes on.
set -euo pipefail

wrong=
[[ -f ${2:-} ]] || wrong="${2:-CONFIG.yaml}: no such file"
[[ -f ${1:-} ]] || wrong="${1:-HOSTFILE}: no such file"
[[ ${JOB:-train} =~ ^(train|doctor)$ ]] || wrong="JOB=$JOB: train or doctor"
command -v python >/dev/null || wrong="no python in PATH: activate the environment first"
if [[ -n $wrong ]]; then
    echo "usage: [JOB=doctor] $0 HOSTFILE CONFIG.yaml [--section.key value ...]; $wrong" >&2
    exit 2
fi
hostfile=$1
config=$2
shift 2

# A hostfile with one host would take the single-node path, on which `deepspeed` reads no .deepspeed_env.
exec python -m sft.launch deepspeed --log_level error --hostfile "$hostfile" --force_multi \
    --master_port "${MASTER_PORT:-29500}" --module "sft.${JOB:-train}" --config "$config" "$@"
