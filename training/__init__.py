"""Training of the networks that come with the package, or of better ones on better data."""
