"""What happens to a sample: where it is read (spatial), what its values become (intensity, targets)."""
