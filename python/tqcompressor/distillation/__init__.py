"""Distillation of a compressed model: teacher, trainer, stages, and the state of a run on disk.

May import torch, transformers and every folder but `native`, `integrations` and `cli`.
"""
