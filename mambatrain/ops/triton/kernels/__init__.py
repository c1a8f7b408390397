"""Triton kernels of Mamba-2's scan, one subject a file; importing one imports triton.

Letters: B rows, L positions, K chunks, H heads in G groups that share B and C, P channels a head, N states. A chunk is
two tiles of T positions. `ops/triton/launch.py` says what each kernel reads and writes, and in which order they run.
"""
