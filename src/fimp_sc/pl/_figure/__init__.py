"""Steps that every figure shares."""
