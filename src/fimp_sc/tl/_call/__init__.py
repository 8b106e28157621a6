"""Steps that every tool shares: its inputs, its model, and its results with a record."""
