"""Local objectives, one file each, which the one training loop calls; and what the server does for those that need it."""
