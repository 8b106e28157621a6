"""Models as folders: weights and configuration, written whole and read without running code."""
