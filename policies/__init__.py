"""Cache policies: one file per method, named as in its paper."""
