"""TensorRT: engines of the graphs of the ``tensorrt`` layout, and what builds them elsewhere."""
