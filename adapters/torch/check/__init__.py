"""What ``hvdloss check`` runs on every rank: the user's script, and what records its steps."""
