"""Checks of objects that users hand in: errors before anything costs time, and warnings about what is uncertain."""
