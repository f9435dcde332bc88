"""Device operations of the engine, one per file: the formula, the torch twin that defines the result, the kernel."""
