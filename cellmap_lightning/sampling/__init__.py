"""The crop, position and tile of each sample."""
