"""How the ranks of a job come to life: on this machine, or under torchrun and Slurm."""
