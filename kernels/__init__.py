"""Device operations of the engine, one per file: the formula, the torch twin that defines the result, the op.

This file imports nothing, so that ``TRITON_INTERPRET`` can be set before any kernel module is loaded.
"""
