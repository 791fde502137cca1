"""The ScoreActor, and how workers talk to it."""
