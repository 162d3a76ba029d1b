"""Pretrain, finetune, evaluate and export MPT models on Composer, StreamingDataset and PyTorch FSDP."""

__version__ = "0.1.0"
