"""Registration of an object with scvi-tools, and graph data made of it."""
