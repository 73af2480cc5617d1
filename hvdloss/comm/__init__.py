"""Exchange between ranks: engines, groups, communicators, bucket plans, and what ranks must have alike."""
