"""lm-evaluation-harness with dcache as a model, and the Monte-Carlo likelihood of masked diffusion models.

Nothing here imports the harness but `harness` and what calls it: it is the extra ``eval``.
"""
