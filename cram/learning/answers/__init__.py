"""Answers of a model to the questions of a stream or of a user."""
