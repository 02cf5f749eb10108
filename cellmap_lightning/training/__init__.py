"""Example tasks, losses, networks, and the results of a training run."""
