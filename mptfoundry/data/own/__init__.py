"""The user's own datasets: what they must provide, and how their items become batches."""
