"""A synthetic volume for demonstrations and tests."""
