"""HTML pages about a result, for people.

May import `errors`, `utils`, `config`, `compression`, `distillation` and `frontier`.
"""
