"""Signal models of the sequences and the dictionaries made from them."""
