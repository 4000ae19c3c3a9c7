"""Hooks into other packages: transformers' quantizer, its registration on import, adapters of peft.

May import torch, transformers, peft, `errors`, `config`, `modules`, `models` and `compression`.
"""
