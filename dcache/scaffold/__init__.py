"""``dcache new-policy``: a package for a policy of one's own, which passes its own tests as it is written."""
