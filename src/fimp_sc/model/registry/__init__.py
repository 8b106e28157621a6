"""What a model registers of an object, and graph data made of it."""
