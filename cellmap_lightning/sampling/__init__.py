"""Sampling: strategies that choose crop and position of each sample, and orders of tiles."""
