"""What a run writes and reads back: its folder, checkpoints, trackers."""
