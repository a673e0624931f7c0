"""Who starts the workers of a campaign: this machine, or Slurm."""
