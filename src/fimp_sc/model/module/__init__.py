"""The scvi-tools module: network, heads and losses, and the linear models from which training starts."""
