"""Agreement: what a policy would have said at each token of a text that the full cache wrote.

``text`` is such a text, ``writing`` lets the full cache write them, ``reading`` reads them through
several caches side by side, ``statistics`` makes a row of it, and ``measure`` does all of this for
cells of a sweep.
"""
