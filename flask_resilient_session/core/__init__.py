"""A session as data, and every decision about its copies.

No clock, no I/O, no Flask, no configuration but the durations it judges by.

===================================================  ==============
question                                             file
===================================================  ==============
what is a session, and how do two states of it join  ``record``
what can a node or SQL answer                        ``answers``
where may a read skip SQL, who is gone               ``reading``
when does a save write SQL, a node out of memory     ``writing``
may a row go                                         ``reaping``
when does what end, when is a sync due               ``lifetimes``
which nodes hold a session, a third copy             ``ring``
a new type of value                                  ``values``
the bytes of a record, MAC, encryption               ``envelope``
===================================================  ==============
"""
