"""One node, and several in one round trip; knows no rows and no requests.

========================================  ==============
question                                  file
========================================  ==============
the bytes on the wire                     ``text_protocol``
sockets, the pool, another client         ``node``
parallel exchanges, who is skipped        ``cluster``
========================================  ==============
"""
