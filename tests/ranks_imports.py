"""What the server of tests/ranks.py imports once for all ranks."""

import composer
import composer.utils
import streaming
import torch
import transformers

import mptfoundry.train

__all__ = ["composer", "mptfoundry", "streaming", "torch", "transformers"]
