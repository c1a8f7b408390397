"""The operators in Triton for CUDA, behind the signatures of `ops/reference.py`.

Nothing here imports triton, which comes with torch for CUDA only, before an operator runs.
"""
