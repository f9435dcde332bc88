"""What ``dcache bench`` measures: kernels, the linear layers alone, and whole policies against them."""
