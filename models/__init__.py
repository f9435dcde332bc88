"""Model families: one transformer, one adapter per published checkpoint format."""
