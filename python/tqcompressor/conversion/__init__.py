"""Checkpoints of other programs become ours: files of torch, the layouts of their tensors, and the writing.

May import `errors`, `_core`, `utils`, `config` and `compression`.
"""
