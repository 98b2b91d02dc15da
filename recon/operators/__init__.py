"""Linear operators of the acquisition and their algebra."""
