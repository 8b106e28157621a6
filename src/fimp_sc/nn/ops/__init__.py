"""Cross-node attention: the one operation that every network is made of.

:mod:`_api` has the contract and chooses a backend; `_reference` is the definition, `_chunked` the batched products,
`numba` and `triton` hold compiled loops and fused kernels. Either folder can be deleted.
"""
