"""The synthetic demo volume."""
