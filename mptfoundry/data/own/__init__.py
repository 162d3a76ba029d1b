"""Datasets of the user's own: what they have to be, and from their items to batches."""
