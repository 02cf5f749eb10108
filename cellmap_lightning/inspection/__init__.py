"""Inspection of data: facts about volumes and crops, their problems, costs, and a proposal of settings."""
