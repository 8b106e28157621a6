"""The graph of nodes as compressed rows, compact spatial tiles, and train and validation nodes split by them.

Row = destination, column = source, everywhere.
"""
