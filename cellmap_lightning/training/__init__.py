"""Example tasks, losses, networks, and what a training run leaves behind."""
