#!/usr/bin/env bash
#SBATCH --job-name=fusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# sbatch launch/slurm.example.sh configs/fusechat-7b.yaml
# The run folder must be on a disk that all nodes share. A job that is requeued goes on where it was cut off.
set -euo pipefail

hosts=$(mktemp -p "$PWD" hostfile.XXXXXX)
trap 'rm -f "$hosts"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=${SLURM_GPUS_ON_NODE:-8}/" >"$hosts"
master=$(head -n 1 "$hosts" | cut -d' ' -f1)

# a launcher stops its own node's ranks where one fails; srun the other nodes'
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "
  deepspeed --hostfile '$hosts' --no_ssh --node_rank \$SLURM_NODEID --master_addr '$master' --master_port 29500 \
    launch/fuse.py --config '${1:?give a config}'
"
