"""The data and configuration that checkpoints record, and the checks of both."""
