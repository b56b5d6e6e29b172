#!/bin/bash
# sbatch configs/launch/slurm.sh PRESET --run-dir /shared/runs/NAME [--flags of python -m train]
# Run it in the checkout, with the environment active. Submitted again, the same line continues the run.
#SBATCH --job-name=parallax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8     # one process for each GPU: so JAX divides them
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # 300 s before the time is up all processes save and stop
#SBATCH --requeue               # a run whose node failed starts again and continues
#SBATCH --open-mode=append
exec srun --kill-on-bad-exit=1 python -u -m train "$@"
