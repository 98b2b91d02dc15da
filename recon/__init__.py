"""Arrays in, maps out: physics and solvers. Knows no ISMRMRD, no sockets, no files."""
