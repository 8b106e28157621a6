"""Cross-node attention: the one operation that every network is made of.

`_api` has the definition and chooses a backend, `_attend` is the operation of torch with its gradients and the contract
of engines, `_chunked` the batched products; `numba` and `triton` hold compiled loops and fused kernels, and either
folder can be deleted.
"""
