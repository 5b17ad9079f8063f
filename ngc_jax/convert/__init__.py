"""Pretrained checkpoints of others: their files, their names and fields, in and out."""
