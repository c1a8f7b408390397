"""The operators in CUDA C++ (`kernels/cuda`), compiled by NVRTC when first used. Not yet run on a GPU."""
