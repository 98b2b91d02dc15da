"""The ``quantitron`` command in a process of its own, also from a bare checkout.

``--stand-in`` first makes the chain know the gadgets of ``stand_in`` instead of the real ones.
"""

import sys

import conftest  # noqa: F401  makes the bare checkout importable

if sys.argv[1:2] == ["--stand-in"]:
    del sys.argv[1]
    import stand_in

    from quantitron.gadgets import chain

    chain.GADGETS = stand_in.GADGETS

from quantitron.host.command import main

if __name__ == "__main__":
    main()
