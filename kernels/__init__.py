"""CUDA C++ and C++ sources of the operators; installed as ``mambatrain._kernels``."""
