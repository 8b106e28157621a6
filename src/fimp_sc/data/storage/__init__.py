"""Matrices where they are stored: memory, HDF5, zarr or dask; read in rows and spans, never loaded as a whole."""
