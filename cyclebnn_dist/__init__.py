"""cyclebnn_dist: distributed training of binary neural networks under a rank-synchronized cyclic precision schedule."""

__version__ = "0.1.0"
