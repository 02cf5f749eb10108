"""Data and configuration recorded in checkpoints, and their checks."""
