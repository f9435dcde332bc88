"""Pictures of a comparison: what a policy recomputed, what that cost, and what became of the texts."""
