"""Coordinate networks: hash-grid encodings, stacked perceptrons, fields. They know torch and arrays only."""
