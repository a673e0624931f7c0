"""Launchers start the workers of a campaign: as processes of this machine, or as tasks of Slurm."""
