"""The runs of a campaign, their division into shards, and the rule for stopping early."""
