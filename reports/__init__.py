"""Maps in, pictures and tables out."""
