"""Many runs on disk: the folder, its shards and their writers, merged at the end."""
