"""The machine a campaign runs on: its libraries, Slurm, requests to stop."""
