"""A live model of transformers: its matrices, swapping its modules, its marks, its tensors in files.

May import torch, transformers, `errors`, `_core`, `utils`, `config` and `modules`.
"""
