"""TensorRT and TensorRT for RTX: the engines of an export, run through NVIDIA's Python modules on a CUDA GPU.

None of this was ever run on a GPU: the project's machines have none. Its tests put a stand-in for NVIDIA's module and a
stand-in for the driver's library in their places; what only a GPU can show, they cannot.
"""
