"""What ``hvdloss check`` runs on every rank: a script of the user's, with somebody who writes down its steps."""
