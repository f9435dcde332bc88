"""Which masked rows to commit at each denoising step: a plugin axis of its own, independent of the cache."""
