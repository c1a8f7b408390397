"""The operators in C++ for CPUs (`kernels/cpu`)."""
