"""One request: the session object, its cookie, Flask's interface.

======================================================  ==============
question                                                file
======================================================  ==============
open and save, as Flask calls them                      ``interface``
one session in one request, where its time is enforced  ``request``
the session object                                      ``session``
the cookie's header                                     ``cookie``
the cookie's format, keys and signatures                ``keys``
what nodes and SQL hold of a session right now          ``inspect``
======================================================  ==============
"""
