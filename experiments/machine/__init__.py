"""The machine that a campaign runs on: its libraries, Slurm, requests to stop."""
