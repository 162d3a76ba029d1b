"""The trainer of tests/trainers.py for this room."""

from tests.trainers import config, make_trainer, stored_rows

__all__ = ["config", "make_trainer", "stored_rows"]
